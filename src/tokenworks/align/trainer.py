"""TokenPreferenceTrainer: TRL's DPOTrainer with the loss of any token-level preference method.

    trainer = TokenPreferenceTrainer(
        model, method=TDPO(alpha=0.5), args=TokenPreferenceConfig("out"), train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()

Data, LoRA (`peft_config`), accumulation, checkpoints, logging and everything that goes through accelerate are
TRL's. Only the loss is replaced, and with it the way the two models are read: see `align.reading`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from tokenworks.align.contract import Outcome, PreferenceMethod, halves
from tokenworks.align.reading import (
    Batch,
    check_same_vocabulary,
    check_sharding,
    join_pairs,
    let_read,
    read_policy,
    read_reference,
)
from tokenworks.core.errors import InputError

SCORES = ("chosen_scores", "rejected_scores")
"""Columns with one number for each token of the tokenized responses."""

METHOD = "token_method"
"""Where a method with parameters hangs in the model, so that whatever trains the model trains them."""

DPO_OPTIONS = (
    "beta", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "label_smoothing", "use_weighting", "precompute_ref_log_probs",
)  # fmt: skip

Scorer = Callable[[list[int], list[int]], list[float]]
"""Takes the ids of a prompt and of a response; gives one number for each of the response's."""


@dataclass
class TokenPreferenceConfig(DPOConfig):
    """TRL's DPOConfig. Its `beta`, `loss_type` and other knobs of the DPO loss do nothing here: the method has its
    own, and setting them is refused.

    Args:
        keep_truncated: train also on pairs of which `max_length` cuts a response off. A cut response has no end,
            and by default such data is refused.
        method_learning_rate, method_weight_decay: of a method's own parameters, such as SparsePO's masks; None
            for those of the model.
    """

    keep_truncated: bool = False
    method_learning_rate: float | None = None
    method_weight_decay: float | None = None


class TokenPreferenceTrainer(DPOTrainer):
    """See the module. Arguments are those of `trl.DPOTrainer`, and:

    Args:
        method: a `PreferenceMethod`. If it is an `nn.Module`, its parameters are trained with the model's and kept
            beside it as `token_method.safetensors`.
        scorer: gives the per-token scores that some methods need, once for all data; not needed if the data has
            the columns of `SCORES` already.

    Raises:
        InputError: an option of the DPO loss, vocabularies that differ, a response that is empty or cut off, or
            scores that are missing or do not fit.
        UnsupportedModelError: the model's head cannot be followed.
    """

    # The Trainer's own annotations know only of its base class's arguments and of models that may be missing.
    args: Any
    model: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        method: PreferenceMethod,
        scorer: Scorer | None = None,
        args: TokenPreferenceConfig | None = None,
        train_dataset: Dataset | None = None,
        **options: Any,
    ) -> None:
        chosen = args if args is not None else TokenPreferenceConfig("token-preference")
        _refuse_dpo_options(chosen)
        check_sharding(chosen)
        if isinstance(model, nn.Module) and isinstance(ref_model, nn.Module):
            check_same_vocabulary(model, ref_model)
        if not isinstance(model, str) and isinstance(method, nn.Module):
            setattr(model, METHOD, method)
        super().__init__(model, ref_model, args=chosen, train_dataset=train_dataset, **options)
        self.method = method
        if isinstance(method, nn.Module):
            method.requires_grad_(True)  # LoRA freezes all that it finds
        let_read(self._bare(self.model))
        if self.ref_model is not None:
            let_read(self.accelerator.unwrap_model(self.ref_model))
        self.train_dataset = self._checked(self.train_dataset, scorer)
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self._checked(self.eval_dataset, scorer)
        if isinstance(self.data_collator, DataCollatorForPreference):
            self.data_collator = _WithScores(self.data_collator, bool(method.needs.scores))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's, with the method's parameters in a group of their own where they have settings of their own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        own = {"lr": self.args.method_learning_rate, "weight_decay": self.args.method_weight_decay}
        own = {name: value for name, value in own.items() if value is not None}
        if fresh and own and isinstance(self.method, nn.Module):
            ids = {id(parameter) for parameter in self.method.parameters()}
            for group in list(optimizer.param_groups):
                theirs = [p for p in group["params"] if id(p) in ids]
                group["params"] = [p for p in group["params"] if id(p) not in ids]
                if theirs:
                    optimizer.add_param_group({"params": theirs, "weight_decay": group["weight_decay"]} | own)
        return optimizer

    def _bare(self, model: Any) -> Any:
        own = self.accelerator.unwrap_model(model)
        return own.get_base_model() if is_peft_model(own) else own

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *SCORES]))

    def _checked(self, data: Any, scorer: Scorer | None) -> Any:
        """The tokenized data with scores, once it is known to be usable."""
        if not isinstance(data, Dataset):
            return data  # a stream is seen row by row
        limit = self.args.max_length
        cut = 0
        for number, row in enumerate(data):
            for side in ("chosen_ids", "rejected_ids"):
                if not row[side]:
                    raise InputError(f"train_dataset: pair {number} has an empty response; leave it out")
                cut += limit is not None and len(row["prompt_ids"]) + len(row[side]) > limit
            if row["chosen_ids"] == row["rejected_ids"]:
                raise InputError(
                    f"train_dataset: both responses of pair {number} are the same; leave it out, it says nothing"
                )
        if cut and not self.args.keep_truncated:
            raise InputError(
                f"max_length: {limit} cuts off {cut} responses, which then have no end. Raise it, shorten the "
                "data, or set keep_truncated"
            )
        return self._scored(data, scorer) if self.method.needs.scores else data

    def _scored(self, data: Dataset, scorer: Scorer | None) -> Dataset:
        if scorer is not None:

            def score(row: dict[str, Any]) -> dict[str, list[float]]:
                return {
                    name: list(map(float, scorer(row["prompt_ids"], row[name.replace("scores", "ids")])))
                    for name in SCORES
                }

            data = data.map(score, desc="Scoring tokens", load_from_cache_file=False)
        if not set(SCORES) <= set(data.column_names):
            raise InputError(
                f"scorer: the method needs {self.method.needs.scores}; give a scorer, or the columns "
                f"{' and '.join(SCORES)} with one number for each token"
            )
        for number, row in enumerate(data):
            for name in SCORES:
                have, want = len(row[name]), len(row[name.replace("scores", "ids")])
                if have != want:
                    raise InputError(f"{name}: pair {number} has {have} numbers for {want} tokens")
        return data

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        needs = self.method.needs
        batch = Batch(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["completion_mask"][:, 1:].bool(),
            inputs["scores"][:, 1:] if needs.scores else None,
        )
        if not batch.mask.any(1).all():
            raise InputError(
                "train_dataset: all tokens of a response are masked; is max_length below its prompt's?"
            )
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
            self._as_reference() as reference,
        ):
            read = read_reference(reference, batch, needs)
        with self.accelerator.autocast():
            found = read_policy(model, batch, read, needs)
        outcome = self.method(join_pairs(batch, read, found, needs))
        loss = outcome.loss.mean()
        self._note(batch, found, outcome)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _as_reference(self) -> Any:
        """The reference: a model of its own, or the policy without its adapter."""
        if self.ref_model is not None:
            return nullcontext(self.ref_model)
        return _Adapted(self.model, self.accelerator.unwrap_model(self.model))

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Only the loss: there are no logits to return."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def _note(self, batch: Batch, found: dict[str, Tensor], outcome: Outcome) -> None:
        """Log under TRL's names, averaged over all processes."""
        mode = "train" if self.model.training else "eval"
        chosen, rejected = halves(outcome.rewards)
        tokens = batch.mask.sum()
        numbers = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "entropy": found["entropy"].sum() / tokens,
        } | {name: torch.as_tensor(float(value), device=tokens.device) for name, value in outcome.metrics.items()}
        if self.method.needs.divergence:
            numbers["divergence"] = found["divergence"].detach().sum() / tokens
        for name, value in numbers.items():
            self._metrics[mode][name].append(self.accelerator.gather(value).float().mean().item())
        if mode == "train":
            seen = self.accelerator.gather_for_metrics(batch.attention_mask.sum()).sum().item()
            self._total_train_tokens += seen
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The model as any other of its kind; the method's parameters beside it."""
        if not isinstance(self.method, nn.Module):
            super()._save(output_dir, state_dict)
            return
        kept = state_dict if state_dict is not None else self.accelerator.unwrap_model(self.model).state_dict()
        super()._save(output_dir, {name: value for name, value in kept.items() if METHOD not in name})
        folder = Path(output_dir or str(self.args.output_dir))
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self.method.state_dict().items()},
            folder / f"{METHOD}.safetensors",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / f"{METHOD}.safetensors"
        if isinstance(self.method, nn.Module) and path.exists():
            self.method.load_state_dict(load_file(path))


class _Adapted:
    """The policy as its own reference, with its adapter switched off for as long as the context lasts."""

    def __init__(self, model: Any, bare: Any) -> None:
        self.model, self.context = model, use_adapter(bare, "ref" if "ref" in bare.peft_config else None)

    def __enter__(self) -> Any:
        self.context.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


@dataclass
class _WithScores:
    """TRL's collator, and the scores padded as it pads ids."""

    collator: DataCollatorForPreference
    scored: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = self.collator(examples)
        if self.scored:
            rows = [
                [0.0] * len(example["prompt_ids"]) + list(example[name]) for name in SCORES for example in examples
            ]
            if self.collator.max_length is not None:
                end = self.collator.truncation_mode == "keep_end"
                length = self.collator.max_length
                rows = [row[-length:] if end else row[:length] for row in rows]
            found["scores"] = torch.zeros(found["input_ids"].shape)
            for number, row in enumerate(rows):
                found["scores"][number, : len(row)] = torch.tensor(row)
        return found


def _refuse_dpo_options(args: TokenPreferenceConfig) -> None:
    """Raise `InputError` for an option that would be passed over in silence."""
    for option in fields(DPOConfig):
        name, make = option.name, option.default_factory
        plain = option.default if make is MISSING else make()
        if name in DPO_OPTIONS and getattr(args, name) != plain:
            raise InputError(
                f"{name}: an option of TRL's DPO loss; a token-level method has its own. Leave it out"
            )
