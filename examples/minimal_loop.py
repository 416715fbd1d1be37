"""UniAPL on one page: demonstrations, rewards and an adversary in every gradient step.

    python examples/minimal_loop.py [--steps 200]

Every step takes a mixed batch. Demonstrations pull the policy towards the expert's answers (SFT, weight mu).
Rollouts are pushed towards higher rewards (GRPO, weight 1 - mu) and towards what a co-trained discriminator
mistakes for the expert (the adversarial term, weight lambda_adv). One forward, three sums, one backward.

The task keeps the three forces apart. A prompt is five letters; the expert spells them backwards, IN CAPITALS,
and stops. The reward sees the letters' places alone: small letters, or babble after the fifth, cost nothing.

    prompt   "cabfe>"            columns of the printout
    expert   "EFBAC."            reward     what RL climbs: the share of letters in their place
    reward 1 "efbac."            win_rate   how often a rollout passes for the expert's answer; 0.5 = always
    reward 1 "eFbACcD_"          as_expert  the share of rollouts that are the expert's answer, to the letter

A method is a setting of three numbers. `main` takes them, and 200 steps end (mean of the last 20) with

    setting                                        reward   as_expert
    UNIAPL_TABLE

What `uniapl.train` has beside this, and why it is not here:

* Prompts of any length, a key-value cache and micro-batches in the sampler and the update: speed and memory.
* Several updates per sampled batch, a KL term and token-weighted SFT: other values of the same few lines.
* Prompts without a demonstration and rewards that are None: this task has neither.
* The discriminator's warm-up, replay and accuracy band: they matter when it is far stronger than the policy.
* Tokenizers, checkpoints, processes, a guard against non-finite gradients: engineering, not method.
"""

import argparse
import copy
import random

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from uniapl.functional import (
    adversarial_advantages,
    bradley_terry_loss,
    clipped_surrogate,
    group_advantages,
    logprobs_from_logits,
    objective,
    sft_loss,
    warmup_cosine,
    win_probability,
)

SEED = 0
LETTERS = "abcdefgh"
PROMPT_LETTERS = 5
PAD, END, ASK = "_", ".", ">"
VOCABULARY = PAD + END + ASK + LETTERS + LETTERS.upper()

PROMPTS_PER_STEP = 8
NUM_GENERATIONS = 8
DEMONSTRATIONS_PER_STEP = 16
MAX_COMPLETION_LENGTH = 8
EPSILON = 0.2
LEARNING_RATE = 2e-3
DISCRIMINATOR_LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0

TokenIds = list[int]


# ---- the task -----------------------------------------------------------------------------------------------


def encode(text: str) -> TokenIds:
    return [VOCABULARY.index(character) for character in text]


def decode(ids: TokenIds) -> str:
    return "".join(VOCABULARY[token] for token in ids)


def random_prompt(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=PROMPT_LETTERS)) + ASK


def expert(prompt: str) -> str:
    return prompt.removesuffix(ASK)[::-1].upper() + END


def reward(prompt: str, answer: str) -> float:
    wanted = prompt.removesuffix(ASK)[::-1]
    return sum(a == b for a, b in zip(wanted, answer.lower(), strict=False)) / len(wanted)


# ---- the two models -----------------------------------------------------------------------------------------


def tiny_policy() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=VOCABULARY.index(PAD),
            initializer_range=0.05,
        )
    )


class Discriminator(nn.Module):
    """d(x, y): one logit per answer, read off its last token; higher = more like the expert's."""

    def __init__(self, policy: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.model)
        self.head = nn.Linear(policy.config.hidden_size, 1, bias=False)
        # All answers start at logit 0: an untrained discriminator gives no adversarial advantage at all.
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(-1) - 1
        return self.head(hidden[torch.arange(len(hidden)), last]).squeeze(-1)


# ---- from texts to tensors ----------------------------------------------------------------------------------


@torch.no_grad()
def sample(policy: Qwen3ForCausalLM, prompts: list[TokenIds]) -> list[TokenIds]:
    """One completion per prompt at temperature 1, its END included if it came to one."""
    ids = torch.tensor(prompts)
    for _ in range(MAX_COMPLETION_LENGTH):
        probs = policy(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], dim=1)
    end = VOCABULARY.index(END)
    completions = ids[:, len(prompts[0]) :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]


def pad(rows: list[tuple[TokenIds, TokenIds]]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, which of them are real, and which belong to the completion.

    Both masks come from lengths: a sampled PAD is a token like any other and is trained as one.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), VOCABULARY.index(PAD))
    for row, (prompt, completion) in zip(input_ids, rows, strict=True):
        row[: len(prompt) + len(completion)] = torch.tensor(prompt + completion)
    starts = torch.tensor([[len(prompt)] for prompt, _ in rows])
    lengths = torch.tensor([[len(prompt) + len(completion)] for prompt, completion in rows])
    position = torch.arange(width)
    return input_ids, position < lengths, (starts <= position) & (position < lengths)


def token_logprobs(policy: Qwen3ForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T]: at each position the log-probability of the token that stands THERE.

    The logits one position earlier predict it. Position 0 has no prediction; it gets 0 and no mask selects it.
    """
    logits = policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    wanted = input_ids[:, 1:]
    logprobs, _ = logprobs_from_logits(logits.flatten(0, 1), wanted.flatten(), torch.ones(wanted.numel()))
    return nn.functional.pad(logprobs.view_as(wanted), (1, 0))


# ---- the method ---------------------------------------------------------------------------------------------


def main(
    steps: int = 200, *, mu_peak: float = 0.5, mu_valley: float = 0.1, lambda_adv: float = 0.5
) -> list[dict[str, float]]:
    """Train from scratch and return each step's measurements."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    policy = tiny_policy()
    discriminator = Discriminator(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=DISCRIMINATOR_LEARNING_RATE, weight_decay=0.0
    )
    history: list[dict[str, float]] = []

    for step in range(steps):
        # Sample: every prompt G times. What was sampled is what is trained, by id; rewards read text.
        prompts = [random_prompt(rng) for _ in range(PROMPTS_PER_STEP)]
        asked = [prompt for prompt in prompts for _ in range(NUM_GENERATIONS)]
        rollouts = sample(policy, [encode(prompt) for prompt in asked])
        answers = [decode(ids) for ids in rollouts]

        # Score: a reward and a discriminator logit per rollout, and one logit per demonstration.
        groups = (PROMPTS_PER_STEP, NUM_GENERATIONS)
        rewards = torch.tensor([reward(p, a) for p, a in zip(asked, answers, strict=True)]).view(groups)
        judged = [(encode(prompt), encode(expert(prompt))) for prompt in prompts]
        judged += [(encode(prompt), ids) for prompt, ids in zip(asked, rollouts, strict=True)]
        judged_ids, judged_attention, _ = pad(judged)
        logits = discriminator(judged_ids, judged_attention)
        expert_logits, policy_logits = logits[:PROMPTS_PER_STEP], logits[PROMPTS_PER_STEP:].view(groups)

        # Credit: how much better than its own group a rollout did, with the verifier and with the adversary.
        known = torch.ones(groups, dtype=torch.bool)
        advantages = group_advantages(rewards, known)
        adversarial = adversarial_advantages(policy_logits.detach(), expert_logits.detach(), known)
        win_rate = win_probability(policy_logits.detach(), expert_logits.detach()).mean()

        # Mix: demonstrations (of other prompts) and rollouts become the rows of one padded batch.
        shown = [random_prompt(rng) for _ in range(DEMONSTRATIONS_PER_STEP)]
        rows = [(encode(prompt), encode(expert(prompt))) for prompt in shown] + judged[PROMPTS_PER_STEP:]
        input_ids, attention_mask, completion_mask = pad(rows)
        is_rollout = (torch.arange(len(rows)) >= len(shown)).unsqueeze(-1)
        sft_mask = completion_mask & ~is_rollout
        rl_mask = adv_mask = completion_mask & is_rollout
        no_credit = torch.zeros(len(shown))
        row_advantages = torch.cat([no_credit, advantages.flatten()])
        row_adversarial_advantages = torch.cat([no_credit, adversarial.flatten()])

        # Update the policy: one forward, three sums, and one place that divides each by its own count.
        mu = warmup_cosine(step, warmup_steps=0, decay_steps=steps, peak=mu_peak, valley=mu_valley)
        logprobs = token_logprobs(policy, input_ids, attention_mask)
        # The policy that sampled is the one that is updated, so the ratio is 1 and its gradient REINFORCE's.
        old_logprobs = logprobs.detach()
        clip = {"clip_low": EPSILON, "clip_high": EPSILON}
        sums = {
            "sft": sft_loss(logprobs, sft_mask),
            "rl": clipped_surrogate(logprobs, old_logprobs, row_advantages, rl_mask, **clip),
            "adv": clipped_surrogate(logprobs, old_logprobs, row_adversarial_advantages, adv_mask, **clip),
        }
        weights = {"sft": mu, "rl": 1 - mu, "adv": lambda_adv}
        counts = {"sft": int(sft_mask.sum()), "rl": int(rl_mask.sum()), "adv": int(adv_mask.sum())}
        loss = objective(sums, weights, counts)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()

        # Update the discriminator: each demonstration should beat every rollout for the same prompt.
        pairs = bradley_terry_loss(expert_logits.repeat_interleave(NUM_GENERATIONS), policy_logits.flatten())
        discriminator_optimizer.zero_grad()
        objective({"pairs": pairs}, {"pairs": 1.0}, {"pairs": len(rollouts)}).backward()
        nn.utils.clip_grad_norm_(discriminator.parameters(), MAX_GRAD_NORM)
        discriminator_optimizer.step()

        measured = {
            "reward": rewards.mean().item(),
            "nll": sums["sft"].item() / counts["sft"],
            "win_rate": win_rate.item(),
            "as_expert": sum(a == expert(p) for p, a in zip(asked, answers, strict=True)) / len(asked),
            "mu": mu,
            "loss": loss.item(),
        }
        history.append(measured)
        if step % 10 == 0 or step == steps - 1:
            columns = "  ".join(f"{name} {value:6.3f}" for name, value in measured.items())
            print(f"step {step:4d}  {columns}  {prompts[0]}{answers[0]}", flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="UniAPL on one page: five letters, spelled backwards.")
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
