"""AlignDistilTrainer: TRL's DistillationTrainer with the teacher of `align.aligndistil`.

    reverse = train_reverse_dpo(base, pairs, args=TokenPreferenceConfig("reverse"), processing_class=tokenizer)
    trainer = AlignDistilTrainer(
        model, dpo_model, reverse_model=reverse, args=AlignDistilConfig("out"), train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()

Prompts, generation (also by vLLM), LoRA (`peft_config`), checkpoints and logging are TRL's. Replaced are the loss
and, off-policy, the generation: there the texts are the data's chosen responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer
from trl.data_utils import apply_chat_template, is_conversational

from tokenworks.align.aligndistil import (
    AGAINST_REFERENCE,
    CONTRASTIVE,
    Composed,
    Mode,
    check_settings,
    distil_loss,
)
from tokenworks.align.dpo import DPO
from tokenworks.align.frozen import check_frozen, prepare_frozen
from tokenworks.align.reading import check_sharding
from tokenworks.align.trainer import TokenPreferenceConfig, TokenPreferenceTrainer
from tokenworks.align.vocabulary import Head, check_head, vocabulary_terms
from tokenworks.core.errors import InputError

CHANNELS = ("alpha", "beta", "divergence")


@dataclass
class AlignDistilConfig(DistillationConfig):
    """TRL's DistillationConfig. Its `beta` (another divergence) and `temperature` have to stay 1.

    Args:
        mode: see `align.aligndistil.Mode`.
        strength: c or k; the authors take 15 on-policy and 10 off-policy for mode "aligndistil".
        beta0: the beta of the DPO that the models were trained with.
        plausible: see `align.aligndistil.compose_teacher`.
        on_policy: learn from what the policy writes; otherwise from the "chosen" column.
    """

    mode: Mode = "aligndistil"
    strength: float = 15.0
    beta0: float = 0.1
    plausible: float = 0.0
    on_policy: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.mode, self.strength, self.beta0, plausible=self.plausible)
        for name in ("beta", "temperature"):
            if getattr(self, name) != 1:
                raise InputError(f"{name}: {getattr(self, name)}; AlignDistil's loss has it at 1. Leave it out")


class AlignDistilTrainer(DistillationTrainer):
    """See the module. Arguments are those of `trl.DistillationTrainer`, and:

    Args:
        dpo_model: trained with DPO from the model that `model` begins as.
        reverse_model: the same with the preferences reversed; for modes "aligndistil" and "contrast".
        ref_model: the model that both began as; for modes "theorem1" and "theorem1_adaptive".

    Raises:
        InputError: a model that the mode needs is missing, or one is there that it does not know; vocabularies
            differ; off-policy, the data has no chosen responses, or some that are too long.
        UnsupportedModelError: a model's head cannot be followed.
    """

    # The loss is a mean over texts, and the Trainer divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False
    # The Trainer's types know neither the fields of this config nor that these are there in training.
    args: Any
    model: Any
    processing_class: Any
    chat_template_kwargs: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        dpo_model: PreTrainedModel,
        *,
        reverse_model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        args: AlignDistilConfig | None = None,
        train_dataset: Dataset | None = None,
        **options: Any,
    ) -> None:
        settings = args if args is not None else AlignDistilConfig("aligndistil")
        check_sharding(settings)
        other = _other(settings.mode, reverse_model, ref_model)
        if isinstance(model, PreTrainedModel):
            check_head(model)
            check_frozen("dpo_model", model, dpo_model)
            if other is not None:
                check_frozen("reverse_model" if reverse_model is not None else "ref_model", model, other)
        dpo_model.requires_grad_(False).eval()
        super().__init__(model, dpo_model, args=settings, train_dataset=train_dataset, **options)
        self.other_model = None if other is None else prepare_frozen(self, other)
        self._given: list[list[int]] | None = None
        self._noted: list[dict[str, Tensor]] = []
        if not settings.on_policy:
            for name, data in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
                if isinstance(data, Dataset):
                    self._check_chosen(name, data)

    # --- off-policy -----------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "chosen"]))

    def _check_chosen(self, name: str, data: Dataset) -> None:
        if "chosen" not in data.column_names:
            raise InputError(f'{name}: no column "chosen", which off-policy training needs; set on_policy=True?')
        limit = self.args.max_completion_length
        for number, row in enumerate(data):
            length = len(self._chosen_ids(row)) if row["chosen"] else 0
            if not length:
                raise InputError(f"{name}: the chosen response of row {number} is empty; leave it out")
            if limit is not None and length > limit:
                raise InputError(
                    f"max_completion_length: {limit} cuts off the chosen response of row {number}, which has "
                    f"{length} tokens. Raise it or shorten the data"
                )

    def _chosen_ids(self, row: dict[str, Any]) -> list[int]:
        """A chosen response as the policy would have written it, up to and including the end."""
        if is_conversational(row):
            both = {"prompt": row["prompt"], "completion": row["chosen"]}
            text = apply_chat_template(both, self.processing_class, **self.chat_template_kwargs)["completion"]
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            stop = next((place for place, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
            return ids[: stop + 1]
        return [
            *self._tokenizer(row["chosen"], add_special_tokens=False)["input_ids"],
            self._tokenizer.eos_token_id,
        ]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._given = None if self.args.on_policy else [self._chosen_ids(row) for row in inputs]
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return found

    def _generate_single_turn(self, *prompts: Any, **options: Any) -> Any:
        return self._given if self._given is not None else super()._generate_single_turn(*prompts, **options)

    # --- the loss -------------------------------------------------------------------------------------------

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Tensor], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the sum of entropies and the number of tokens, which TRL logs. Whole texts count alike,
        so the number of items does nothing."""
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        read = (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            mask.shape[1],
        )
        # Place i of these predicts token i of the completion: the first and the end of the text are included.
        hidden = self._get_last_hidden_state(unwrapped_student, *read)[mask]
        teacher = Composed(
            self._frozen(self.teacher_model, read, mask),
            None if self.other_model is None else self._frozen(self.other_model, read, mask),
            self.args.mode, self.args.strength, self.args.beta0, self.args.plausible,
        )  # fmt: skip
        terms = vocabulary_terms(
            Head.of(unwrapped_student), hidden, inputs["completion_ids"][mask], teacher, "reverse"
        )

        def rows(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)

        loss = distil_loss(rows(terms.divergence), rows(teacher.beta), mask)
        self._noted.append({"alpha": teacher.alpha, "beta": teacher.beta, "divergence": terms.divergence.detach()})
        return loss, terms.entropy.sum(), mask.sum()

    def _frozen(self, model: Any, read: tuple[Tensor, Tensor, int], mask: Tensor) -> tuple[Head, Tensor]:
        """Head and states of a frozen model at the response tokens, read through whatever wraps it."""
        model.eval()
        bare = self.accelerator.unwrap_model(model)

        def head_and_states(own: Any, *read: Any) -> tuple[Head, Tensor]:
            return Head.lasting(own), self._get_last_hidden_state(own, *read)[mask]

        with torch.no_grad():
            found: tuple[Head, Tensor] = self._forward_redirection(model, bare, head_and_states, bare, *read)
        return found

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        found = super().compute_loss(*arguments, **options)
        mode = "train" if self.model.training else "eval"
        for name in CHANNELS:
            values = torch.cat([noted[name] for noted in self._noted])
            total = self.accelerator.gather(torch.stack([values.sum(), values.new_tensor(len(values))])[None]).sum(
                0
            )
            self._metrics[mode][name].append((total[0] / total[1]).item())
        self._noted.clear()
        return found


def _other(
    mode: Mode, reverse: PreTrainedModel | None, reference: PreTrainedModel | None
) -> PreTrainedModel | None:
    """The second model of a mode."""
    wanted = {"reverse_model": reverse} if mode in CONTRASTIVE else {"ref_model": reference}
    if mode == "gkd":
        wanted = {}
    for name, model in (("reverse_model", reverse), ("ref_model", reference)):
        if (model is not None) != (name in wanted):
            said = "needs it" if name in wanted else f"has no use for it; it takes {_takes(mode)}"
            raise InputError(f"{name}: mode {mode!r} {said}")
    return next(iter(wanted.values()), None)


def _takes(mode: Mode) -> str:
    if mode in CONTRASTIVE:
        return "reverse_model"
    return "ref_model" if mode in AGAINST_REFERENCE else "only dpo_model"


# --- the reverse model --------------------------------------------------------------------------------------


def swap_preferences(pairs: Dataset) -> Dataset:
    """The same pairs with chosen and rejected exchanged.

    Raises:
        InputError: one of the two columns is missing.
    """
    missing = {"chosen", "rejected"} - set(pairs.column_names)
    if missing:
        raise InputError(f"pairs: no column {sorted(missing)[0]!r}; there are {', '.join(pairs.column_names)}")
    return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})


def train_reverse_dpo(
    model: Any,
    pairs: Dataset,
    *,
    beta0: float = 0.1,
    args: TokenPreferenceConfig | None = None,
    **options: Any,
) -> Any:
    """Train `model` with DPO to prefer what was rejected, in place; returns it as the trainer leaves it.

    One epoch is enough: what is trained to be bad soon only repeats itself.

    Args:
        options: of `TokenPreferenceTrainer`.
    """
    trainer = TokenPreferenceTrainer(
        model, method=DPO(beta0), args=args, train_dataset=swap_preferences(pairs), **options
    )
    trainer.train()
    return trainer.model
