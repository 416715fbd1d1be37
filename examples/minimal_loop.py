"""UniAPL on one page: SFT, GRPO and a discriminator in every gradient step.

    python examples/minimal_loop.py [--steps 250]

Each step uses one mixed batch. Demonstrations contribute an SFT loss (weight mu). Rollouts contribute a GRPO
loss on the rewards (weight 1 - mu) and an adversarial loss (weight lambda_adv), whose advantages come from a
discriminator that is trained together with the policy to distinguish demonstrations from rollouts.

The toy task needs all three. A prompt is four letters; the completion is the same letters in reverse order.
The expert writes CAPITALS and then stops, but gets one letter in eight wrong. The reward counts correct
letters, ignores capitals, and has a flaw that invites reward hacking: it pays for extra characters. For the
prompt "cabf>" the expert's completion "FBAC." earns 0.7; so does "fBaC."; "FBACd." earns 0.85.

The arguments of `main` select the method. Results (mean of the last 20 of 250 steps and of seeds 0 to 2):

                         mu            lambda_adv    reward   letter accuracy   in the expert's format
    SFT                  1             0              0.59        0.85            0.99
    GRPO                 0             0              0.52        0.31            0.00
    GRPO + adversary     0             1              0.52        0.31            0.00
    SFT + GRPO           0.5 -> 0.02   0              0.92        0.95            0.13
    UniAPL               0.5 -> 0.02   1              0.67        0.96            0.98

SFT reproduces the expert's errors. GRPO from random weights exploits the extra characters. The adversary does
not help there: the discriminator detects every rollout easily and scores all of them alike, so it gives no
adversarial advantage. SFT + GRPO earns the highest reward, but by exploiting the flaw: once mu has decayed,
only the adversary preserves the expert's format.

`uniapl.train` has these features in addition; they are left out here for the given reason:

* Separate streams of prompts and demonstrations, prompts of any length or without a demonstration, rewards
  that are None. Here every row has all of these, so that one batch serves both models.
* A key-value cache, micro-batches, several processes. They give the same results faster, with less memory.
* Several updates per sampled batch, a KL term, weighted SFT tokens. The same functions take more arguments.
* Warm-up, replay, pauses of the discriminator. They prevent it from overpowering a policy that starts far
  from the expert.
* Tokenizers, checkpoints, a guard against non-finite gradients. Real runs need them; the method does not.
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

LETTERS = "abcdefgh"
PROMPT_LETTERS = 4
PAD, END, ASK = "_", ".", ">"
VOCABULARY = PAD + END + ASK + LETTERS + LETTERS.upper()
EXPERT_ERROR_RATE = 0.15
LENGTH_BONUS = 0.15

PROMPTS_PER_STEP = 12
NUM_GENERATIONS = 6
MAX_COMPLETION_LENGTH = PROMPT_LETTERS + 3
EPSILON = 0.2
LEARNING_RATE = 2e-3
MAX_GRAD_NORM = 1.0


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[token] for token in ids)


def expert(prompt: str, rng: random.Random) -> str:
    letters = [
        rng.choice(LETTERS) if rng.random() < EXPERT_ERROR_RATE else x for x in prompt.removesuffix(ASK)
    ]
    return "".join(reversed(letters)).upper() + END


def letter_accuracy(prompt: str, completion: str) -> float:
    target = prompt.removesuffix(ASK)[::-1]
    return sum(a == b for a, b in zip(target, completion.lower(), strict=False)) / PROMPT_LETTERS


def in_expert_format(completion: str) -> bool:
    """Four capitals and END, as in every demonstration; the reward does not require this."""
    return len(completion) == PROMPT_LETTERS + 1 and completion[-1] == END and completion[:-1].isupper()


def reward(prompt: str, completion: str) -> float:
    """A reward in [0, 1]; without extra characters at most 0.7."""
    extra_characters = max(0, len(completion) - PROMPT_LETTERS - 1)
    return 0.7 * letter_accuracy(prompt, completion) + LENGTH_BONUS * extra_characters


class Discriminator(nn.Module):
    """d(x, y): one logit per completion, at its last token; higher means more like a demonstration."""

    def __init__(self, policy: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.model)
        self.head = nn.Linear(policy.config.hidden_size, 1, bias=False)
        # Start with logit 0 for every completion, so that the adversarial advantages are 0 before training.
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(-1) - 1
        return self.head(hidden[torch.arange(len(hidden)), last]).squeeze(-1)


@torch.no_grad()
def sample(policy: Qwen3ForCausalLM, prompts: list[str]) -> list[list[int]]:
    """Sample one completion per prompt at temperature 1, including END if it was sampled."""
    ids = torch.tensor([encode(prompt) for prompt in prompts])
    for _ in range(MAX_COMPLETION_LENGTH):
        probs = policy(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], dim=1)
    end = VOCABULARY.index(END)
    completions = ids[:, PROMPT_LETTERS + 1 :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in completions]


def pad(prompts: list[str], completions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return right-padded ids, the attention mask and the completion mask, each [B, T].

    The masks depend on lengths, not on ids: a sampled PAD is trained like any other token.
    """
    rows = [torch.tensor(encode(prompt) + ids) for prompt, ids in zip(prompts, completions, strict=True)]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCABULARY.index(PAD))
    position = torch.arange(input_ids.shape[1])
    attention_mask = position < torch.tensor([[len(row)] for row in rows])
    return input_ids, attention_mask, attention_mask & (position > PROMPT_LETTERS)


def token_logprobs(policy: Qwen3ForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Log-probability of the token at each position [B, T], aligned with `input_ids` and the masks.

    Each token is predicted by the logits before it. Position 0 has none and gets 0; no mask selects it.
    """
    logits = policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    targets = input_ids[:, 1:]
    logprobs, _ = logprobs_from_logits(logits.flatten(0, 1), targets.flatten(), torch.ones(targets.numel()))
    return nn.functional.pad(logprobs.view_as(targets), (1, 0))


def update(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def main(
    steps: int = 250, *, mu_peak: float = 0.5, mu_valley: float = 0.02, lambda_adv: float = 1.0, seed: int = 0
) -> list[dict[str, float]]:
    """Train from random weights; return the metrics of every step."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.05}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    policy = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(VOCABULARY), **size, **heads))
    discriminator = Discriminator(policy)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=LEARNING_RATE, weight_decay=0.0
    )
    P, G = PROMPTS_PER_STEP, NUM_GENERATIONS
    has_reward = torch.ones(P, G, dtype=torch.bool)
    is_rollout = torch.arange(P + P * G).unsqueeze(-1) >= P
    history: list[dict[str, float]] = []

    for step in range(steps):
        # Train on the sampled ids themselves; the decoded text is only used by the reward.
        prompts = ["".join(rng.choices(LETTERS, k=PROMPT_LETTERS)) + ASK for _ in range(P)]
        demonstrations = [encode(expert(prompt, rng)) for prompt in prompts]
        rollout_prompts = [prompt for prompt in prompts for _ in range(G)]
        rollouts = sample(policy, rollout_prompts)
        samples = [(p, decode(ids)) for p, ids in zip(rollout_prompts, rollouts, strict=True)]
        rewards = torch.tensor([reward(p, c) for p, c in samples]).view(P, G)

        # One batch: P demonstrations, then P * G rollouts. Masks select the tokens of each loss component.
        input_ids, attention_mask, completion_mask = pad(prompts + rollout_prompts, demonstrations + rollouts)
        sft_mask = completion_mask & ~is_rollout
        rl_mask = adv_mask = completion_mask & is_rollout

        # One forward pass serves two purposes: adversarial advantages (detached) and the loss below.
        logits = discriminator(input_ids, attention_mask)
        expert_logits, policy_logits = logits[:P], logits[P:].view(P, G)
        win_rate = win_probability(policy_logits.detach(), expert_logits.detach())

        # Advantages are relative to the group, so that anything shared by all its completions cancels out.
        rl_credit = group_advantages(rewards, has_reward)
        adv_credit = adversarial_advantages(policy_logits.detach(), expert_logits.detach(), has_reward)
        rl_advantages = torch.cat([torch.zeros(P), rl_credit.flatten()])
        adv_advantages = torch.cat([torch.zeros(P), adv_credit.flatten()])

        # mu decays: rely on demonstrations while exploration rarely succeeds, and on rewards later.
        mu = warmup_cosine(step, warmup_steps=0, decay_steps=steps, peak=mu_peak, valley=mu_valley)
        logprobs = token_logprobs(policy, input_ids, attention_mask)
        # With one update per batch the policy is still the one that sampled, so every ratio is 1.
        old_logprobs = logprobs.detach()
        clip = {"clip_low": EPSILON, "clip_high": EPSILON}
        sums = {
            "sft": sft_loss(logprobs, sft_mask),
            "rl": clipped_surrogate(logprobs, old_logprobs, rl_advantages, rl_mask, **clip),
            "adv": clipped_surrogate(logprobs, old_logprobs, adv_advantages, adv_mask, **clip),
        }
        weights = {"sft": mu, "rl": 1 - mu, "adv": lambda_adv}
        counts = {"sft": int(sft_mask.sum()), "rl": int(rl_mask.sum()), "adv": int(adv_mask.sum())}
        # Each sum is divided by its own token count, so more rollouts do not reduce the weight of SFT.
        loss = objective(sums, weights, counts)
        update(policy, policy_optimizer, loss)

        # The demonstration should score higher than each rollout of the same prompt. The discriminator is
        # updated after scoring, so that it scores completions on which it has not been trained.
        pair_loss = bradley_terry_loss(expert_logits.repeat_interleave(G), policy_logits.flatten())
        discriminator_loss = objective({"pairs": pair_loss}, {"pairs": 1.0}, {"pairs": P * G})
        update(discriminator, discriminator_optimizer, discriminator_loss)

        metrics = {
            "reward": rewards.mean().item(),
            "right": sum(letter_accuracy(p, c) for p, c in samples) / len(samples),
            "manner": sum(in_expert_format(c) for _, c in samples) / len(samples),
            "nll": sums["sft"].item() / counts["sft"],
            "win_rate": win_rate.mean().item(),
            "mu": mu,
            "loss": loss.item(),
        }
        history.append(metrics)
        if step % 10 == 0 or step == steps - 1:
            columns = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"step {step:3d}  {columns}  {''.join(samples[0])}", flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="UniAPL on one page: write four letters in reverse order.")
    parser.add_argument("--steps", type=int, default=250, help="training steps")
    main(parser.parse_args().steps)
