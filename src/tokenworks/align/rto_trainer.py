"""RTOTrainer: PPO with a reward at every token, on TRL's GRPOTrainer.

    trainer = RTOTrainer(
        model, reward_funcs=judge, dpo_model=dpo, args=RTOConfig("out"), train_dataset=prompts,
        processing_class=tokenizer,
    )
    trainer.train()

TRL has no PPO trainer any more. Of GRPO's everything is kept that PPO shares (sampling, also by vLLM, minibatches,
the clipped loss, LoRA, checkpoints, logging). What makes it GRPO is replaced: there is a critic, and advantages
come from `align.rto` and not from a group of answers, so that one answer to a prompt is enough.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from tokenworks.align.contract import check_not_negative, check_positive
from tokenworks.align.critic import Critic, check_critic, values_of
from tokenworks.align.frozen import check_frozen, prepare_frozen
from tokenworks.align.reading import check_sharding, let_read
from tokenworks.align.rto import (
    check_sentence_rewards,
    dense_rewards,
    gae,
    token_totals,
    value_loss,
    whiten,
)
from tokenworks.align.scores import Scorer
from tokenworks.align.vocabulary import CHUNK, Head
from tokenworks.core.errors import InputError

CRITIC, CRITIC_OPTIMIZER = "critic.safetensors", "critic_optimizer.pt"

REFUSED = {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "token"}
"""Options of GRPO that would be passed over or change the loss; the value that they must keep."""


@dataclass
class RTOConfig(GRPOConfig):
    """TRL's GRPOConfig. `num_iterations` are PPO's epochs, `steps_per_generation` its minibatches, `epsilon` its
    clip; `temperature` counts for all models.

    Args:
        beta1, dpo_clip: scale of the DPO model's log-ratios, and the size that they are then clamped to (or None).
            beta1 = 0 is PPO. The authors tune only beta1, and say it must not dominate.
        beta2: scale of the penalty for leaving the reference.
        beta3, reward_clip: of the sentence's reward, which is clamped before it is scaled.
        reward_mean, reward_std: of the reward functions' sum; they are what "normalised" means.
        gamma, gae_lambda: of the advantages.
        value_clip: how far a value may move in the loss, in units of reward.
        critic_learning_rate: scheduled like the policy's.
    """

    num_generations: int | None = 1
    loss_type: str = "grpo"
    beta1: float = 0.05
    dpo_clip: float | None = 0.05
    beta2: float = 0.01
    beta3: float = 1.0
    reward_clip: float = 10.0
    reward_mean: float = 0.0
    reward_std: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float = 0.2
    critic_learning_rate: float = 9e-6

    def __post_init__(self) -> None:
        # GRPO wants groups of two or more, for a baseline that PPO does without.
        wanted, self.num_generations = self.num_generations, max(2, self.num_generations or 1)
        super().__post_init__()
        self.num_generations = wanted
        for name, value in REFUSED.items():
            if getattr(self, name) != value:
                raise InputError(
                    f"{name}: {getattr(self, name)!r}; RTO has a loss of its own. Leave it at {value!r}"
                )
        for name in ("beta1", "beta2", "beta3", "reward_clip", "value_clip", "epsilon"):
            check_not_negative(**{name: getattr(self, name)})
        check_not_negative(dpo_clip=self.dpo_clip or 0.0)
        check_positive(reward_std=self.reward_std, critic_learning_rate=self.critic_learning_rate)
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name)} is not in [0, 1]")


class RTOTrainer(GRPOTrainer):
    """See the module. Arguments are those of `trl.GRPOTrainer` without tools and environments, and:

    Args:
        dpo_model: trained with DPO from the model that `model` begins as; not needed where beta1 = 0.
        token_reward: in place of it, any scorer of `align.scores`; its numbers stand for log(dpo / ref).
        ref_model: what the KL penalty is to; by default the policy as it is now, or without its adapter.
        critic: gives a value at every token: a small network on the reference's last states by default; any other
            module from states [B, T, d] to [B, T]; or a token classifier with one label, such as a reward model
            loaded with AutoModelForTokenClassification, as the authors begin theirs.

    Raises:
        InputError: no or two sources of token rewards, vocabularies that differ, a critic with dropout or of the
            wrong shape, rewards that are missing or not finite, a prompt that leaves no room, or GRPO's tools.
        UnsupportedModelError: a model's head cannot be followed.
    """

    # The Trainer's types know neither the fields of this config nor that these are there in training.
    args: Any
    model: Any
    lr_scheduler: Any
    max_completion_length: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        *,
        dpo_model: PreTrainedModel | None = None,
        token_reward: Scorer | None = None,
        ref_model: PreTrainedModel | None = None,
        critic: nn.Module | None = None,
        args: RTOConfig | None = None,
        train_dataset: Dataset | None = None,
        **options: Any,
    ) -> None:
        settings = args if args is not None else RTOConfig("rto")
        check_sharding(settings)
        for name in ("tools", "rollout_func", "environment_factory"):
            if options.get(name) is not None:
                raise InputError(
                    f"{name}: advantages over tokens that others wrote are not defined here; leave it out"
                )
        if settings.beta1 and (dpo_model is None) == (token_reward is None):
            raise InputError("dpo_model: give it or token_reward, and not both; or set beta1=0, which is PPO")
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"model: {type(model).__name__} is not a loaded model; pass a PreTrainedModel")
        for name, other in (("dpo_model", dpo_model), ("ref_model", ref_model)):
            if other is not None:
                check_frozen(name, model, other)
        if ref_model is None and options.get("peft_config") is None and not is_peft_model(model):
            ref_model = copy.deepcopy(model)
        for other in (dpo_model, ref_model):
            if other is not None:
                let_read(other)
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        super().__init__(
            model, [_checked(f) for f in funcs], args=settings, train_dataset=train_dataset, **options
        )
        bare = self.accelerator.unwrap_model(self.model)
        let_read(bare.get_base_model() if is_peft_model(bare) else bare)
        self.reference = None if ref_model is None else prepare_frozen(self, ref_model)
        self.dpo_model = None if dpo_model is None else prepare_frozen(self, dpo_model)
        self.token_reward = token_reward
        width = bare.config.get_text_config().hidden_size
        critic = critic if critic is not None else Critic(width)
        check_critic(critic, width)
        self.critic = self.accelerator.prepare_model(critic)
        self.critic_optimizer = torch.optim.AdamW(
            [p for p in critic.parameters() if p.requires_grad], settings.critic_learning_rate, betas=(0.9, 0.95),
            weight_decay=0.0,
        )  # fmt: skip
        self._sentence: Tensor | None = None

    # --- what was written, and what it is worth ---------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        found = super()._tokenize_prompts(prompts)
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, found[0]))
        if room is not None and longest + self.max_completion_length > room:
            raise InputError(
                f"train_dataset: a prompt of {longest} tokens and max_completion_length "
                f"{self.max_completion_length} do not fit the model's {room} positions; shorten either"
            )
        return found

    def _calculate_rewards(self, inputs: Any, prompts: list[Any], completions: Any, completion_ids: Any) -> Tensor:
        found: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        begin = self.accelerator.process_index * len(prompts)
        total = (found * self.reward_weights.to(found.device)).sum(1)[begin : begin + len(prompts)]
        check_sentence_rewards(total, len(prompts))
        self._sentence = (total - self.args.reward_mean) / self.args.reward_std
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout with advantages by token in place of its own."""
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
        attention = torch.cat([found["prompt_mask"], found["completion_mask"]], 1)
        mask = found["completion_mask"].bool()
        quiet = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), quiet:
            if "old_per_token_logps" not in found:
                found["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, mask.shape[1], self.args.per_device_train_batch_size
                )
            log_ref, states = self._read_reference(ids, attention, mask)
            ratio = self._token_rewards(found, ids, attention, mask, log_ref)
            if isinstance(self.accelerator.unwrap_model(self.critic), PreTrainedModel):
                states = None  # it reads the texts itself
            values = values_of(self.critic, ids, attention, states, mask)
        assert self._sentence is not None
        rewards = dense_rewards(
            log_ref + ratio, log_ref, found["old_per_token_logps"], mask, self._sentence, self.args.beta1,
            self.args.beta2, self.args.beta3, self.args.dpo_clip, self.args.reward_clip,
        )  # fmt: skip
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)
        totals = self.accelerator.reduce(token_totals(advantages, mask), "sum")
        found |= {"advantages": whiten(advantages, mask, totals), "returns": returns, "old_values": values}
        if states is not None:
            found["critic_states"] = states
        self._note(ratio, log_ref, found, rewards, mask)
        return found

    def _read_reference(self, ids: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.reference is not None:
            return self._read(self.reference, ids, attention, mask)
        bare = self.accelerator.unwrap_model(self.model)
        with use_adapter(bare, "ref" if "ref" in bare.peft_config else None):
            return self._read(self.model, ids, attention, mask)

    def _read(self, model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T] of the response at the temperature of sampling, and the states [B, T, d] that
        each token was predicted from; through whatever wraps the model, and a few rows at a time."""
        logs, states = [], []
        size = self.args.per_device_train_batch_size
        for start in range(0, len(ids), size):
            part = slice(start, start + size)

            def using(own: Any, found: Any, part: slice = part) -> dict[str, Tensor]:
                hidden = found.last_hidden_state[:, -mask.shape[1] - 1 : -1]
                flat, labels = hidden.flatten(0, 1), ids[part, -mask.shape[1] :].flatten()
                log = [
                    torch.log_softmax(Head.of(own).log_probs(flat[i : i + CHUNK]) / self.temperature, -1)
                    .gather(1, labels[i : i + CHUNK, None])
                    for i in range(0, len(flat), CHUNK)
                ]  # fmt: skip
                return {"log_p": torch.cat(log).view(hidden.shape[:2]), "states": hidden}

            with self.accelerator.autocast():
                read = model(input_ids=ids[part], attention_mask=attention[part], using=using)
            logs.append(read["log_p"])
            states.append(read["states"].float())
        return torch.where(mask, torch.cat(logs), 0.0), torch.cat(states)

    def _token_rewards(
        self, found: dict[str, Tensor], ids: Tensor, attention: Tensor, mask: Tensor, log_ref: Tensor
    ) -> Tensor:
        """log(dpo / ref), or what the scorer says: float [B, T], zero outside the mask."""
        if not self.args.beta1:
            return torch.zeros_like(log_ref)
        if self.dpo_model is not None:
            return self._read(self.dpo_model, ids, attention, mask)[0] - log_ref
        assert self.token_reward is not None
        rows = torch.zeros_like(log_ref)
        for row, own in enumerate(mask):
            prompt = found["prompt_ids"][row][found["prompt_mask"][row].bool()].tolist()
            response = found["completion_ids"][row][own].tolist()
            scores = torch.tensor(self.token_reward(prompt, response), device=rows.device)
            if scores.shape != (len(response),) or not torch.isfinite(scores).all():
                raise InputError(
                    f"token_reward: it gave numbers of shape {list(scores.shape)} for {len(response)} tokens, or "
                    "some that are not finite; give one for each token of the response"
                )
            rows[row, own] = scores.float()
        return rows

    def _note(
        self, ratio: Tensor, log_ref: Tensor, found: dict[str, Tensor], rewards: Tensor, mask: Tensor
    ) -> None:
        """Log by text, averaged over all processes."""
        assert self._sentence is not None
        kl = torch.where(mask, found["old_per_token_logps"] - log_ref, 0.0).sum(1)
        numbers = {
            "rto/token_reward": torch.where(mask, self.args.beta1 * ratio, 0.0).sum(1),
            "rto/sentence_reward": self._sentence,
            "rto/kl": kl,
            "rto/return": rewards.sum(1),
        }
        mode = "train" if self.model.training else "eval"
        for name, values in numbers.items():
            self._metrics[mode][name].append(self.accelerator.gather(values.mean()).mean().item())

    # --- learning ---------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """PPO's policy loss, which TRL has, and the critic's: they share no parameter."""
        mask = inputs["completion_mask"].bool()
        actor: Tensor = super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        values = values_of(self.critic, ids, attention, inputs.get("critic_states"), mask)
        critic = value_loss(values, inputs["old_values"], inputs["returns"], mask, self.args.value_clip)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rto/value_loss"].append(self.accelerator.gather(critic.detach()).mean().item())
        return actor + critic / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """The critic takes its step with the policy's, clipped by itself."""
        found: Tensor = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients:
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm or float("inf"))
            share = self.lr_scheduler.get_last_lr()[0] / (self.args.learning_rate or 1.0)
            for group in self.critic_optimizer.param_groups:
                group["lr"] = share * self.args.critic_learning_rate
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad(set_to_none=True)
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            kept = self.accelerator.unwrap_model(self.critic).state_dict()
            save_file({n: p.detach().cpu().contiguous() for n, p in kept.items()}, Path(output_dir) / CRITIC)
            torch.save(self.critic_optimizer.state_dict(), Path(output_dir) / CRITIC_OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / CRITIC).exists():
            self.accelerator.unwrap_model(self.critic).load_state_dict(load_file(Path(checkpoint) / CRITIC))
            state = torch.load(Path(checkpoint) / CRITIC_OPTIMIZER, weights_only=True)
            self.critic_optimizer.load_state_dict(state)


def _checked(func: Any) -> Any:
    """A reward function that says what is wrong with what it returns, before TRL stumbles over it."""
    if not callable(func) or isinstance(func, nn.Module):
        return func

    @functools.wraps(func)
    def rewards(*arguments: Any, prompts: list[Any], **options: Any) -> list[float]:
        found = func(*arguments, prompts=prompts, **options)
        name = getattr(func, "__name__", "reward_funcs")
        if any(value is None for value in found):
            raise InputError(f"{name}: it has no reward for some text; PPO needs one for each")
        try:
            check_sentence_rewards(torch.as_tensor(found, dtype=torch.float32), len(prompts))
        except (InputError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{name}: {error}") from error
        return [float(value) for value in found]

    return rewards
