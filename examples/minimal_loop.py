"""UniAPL on one page: demonstrations, rewards and an adversary in every gradient step.

    python examples/minimal_loop.py [--steps 250]

Each step takes one mixed batch. Demonstrations pull the policy towards the expert's answers (SFT, weight mu).
Rollouts are pushed towards higher rewards (GRPO, weight 1 - mu) and towards what a discriminator, trained
beside the policy, takes for the expert's work (the adversarial force, weight lambda_adv).

The toy task needs all three. A prompt is four letters, the answer is the same letters backwards. The expert
writes CAPITALS and then stops, but gets one letter in eight wrong. The reward knows the right letters, does
not see capitals, and has a flaw that invites hacking: it pays for babble. To "cabf>" the expert answers
"FBAC." and earns 0.7; so does "fBaC."; "FBACd." earns 0.85.

A method is a setting of `main`'s numbers. Here (last 20 of 250 steps, mean of seeds 0 to 2) they lead to

                         mu            lambda_adv    reward   letters right   in the expert's manner
    SFT                  1             0              0.59        0.85            0.99
    GRPO                 0             0              0.52        0.31            0.00
    GRPO + adversary     0             1              0.52        0.31            0.00
    SFT + GRPO           0.5 -> 0.02   0              0.92        0.95            0.13
    UniAPL               0.5 -> 0.02   1              0.67        0.96            0.98

SFT copies the expert's slips. RL from nothing goes for the babble, and an adversary that tells the two apart
at sight has no credit to give: all rollouts look equally false. With both, the highest reward is the hacked
one; once the demonstrations fade, only the adversary holds the manner.

What `uniapl.train` has beside this, and why it is left out here:

* Separate streams of prompts and demonstrations, prompts of any length or without a demonstration, rewards
  that are None: here every row has everything, so that one batch serves both models.
* A key-value cache, micro-batches, several processes: the same numbers, faster and in less memory.
* Several updates per sampled batch, a KL term, weighted SFT tokens: further arguments of the same few lines.
* The discriminator's warm-up, replay and pauses, against overpowering a policy that starts far away.
* Tokenizers, checkpoints, a guard against non-finite gradients: needed in earnest, no part of the method.
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
EXPERT_SLIPS = 0.15
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
    letters = [rng.choice(LETTERS) if rng.random() < EXPERT_SLIPS else x for x in prompt.removesuffix(ASK)]
    return "".join(reversed(letters)).upper() + END


def right_letters(prompt: str, answer: str) -> float:
    wanted = prompt.removesuffix(ASK)[::-1]
    return sum(a == b for a, b in zip(wanted, answer.lower(), strict=False)) / PROMPT_LETTERS


def in_manner(answer: str) -> bool:
    """What the expert always does and no reward asks for."""
    return len(answer) == PROMPT_LETTERS + 1 and answer[-1] == END and answer[:-1].isupper()


def reward(prompt: str, answer: str) -> float:
    """In [0, 1]; 0.7 is as much as an honest answer gets."""
    too_many = max(0, len(answer) - PROMPT_LETTERS - 1)
    return 0.7 * right_letters(prompt, answer) + LENGTH_BONUS * too_many


class Discriminator(nn.Module):
    """d(x, y): one logit per answer, read off its last token; higher = more like the expert."""

    def __init__(self, policy: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.model)
        self.head = nn.Linear(policy.config.hidden_size, 1, bias=False)
        # All answers start at logit 0: an untrained discriminator gives no adversarial advantage.
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(-1) - 1
        return self.head(hidden[torch.arange(len(hidden)), last]).squeeze(-1)


@torch.no_grad()
def sample(policy: Qwen3ForCausalLM, prompts: list[str]) -> list[list[int]]:
    """One completion per prompt at temperature 1, its END included if it came to one."""
    ids = torch.tensor([encode(prompt) for prompt in prompts])
    for _ in range(MAX_COMPLETION_LENGTH):
        probs = policy(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], dim=1)
    end = VOCABULARY.index(END)
    completions = ids[:, PROMPT_LETTERS + 1 :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in completions]


def pad(prompts: list[str], completions: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids [B, T], which of them are real, and which of those belong to the completion.

    Masks come from lengths, never from ids: a PAD that was sampled is trained like any other token.
    """
    rows = [torch.tensor(encode(prompt) + ids) for prompt, ids in zip(prompts, completions, strict=True)]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCABULARY.index(PAD))
    position = torch.arange(input_ids.shape[1])
    attention_mask = position < torch.tensor([[len(row)] for row in rows])
    return input_ids, attention_mask, attention_mask & (position > PROMPT_LETTERS)


def token_logprobs(policy: Qwen3ForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T]: at each position the log-probability of the token that stands THERE, as the masks speak of it.

    The logits one position earlier predict it; position 0 has none, gets 0, and no mask ever selects it.
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
    """Train from random weights; return the measurements of every step."""
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
    known = torch.ones(P, G, dtype=torch.bool)
    is_rollout = torch.arange(P + P * G).unsqueeze(-1) >= P
    history: list[dict[str, float]] = []

    for step in range(steps):
        # The ids that were sampled are the ids that are trained; text is decoded for the reward alone.
        prompts = ["".join(rng.choices(LETTERS, k=PROMPT_LETTERS)) + ASK for _ in range(P)]
        demonstrations = [encode(expert(prompt, rng)) for prompt in prompts]
        asked = [prompt for prompt in prompts for _ in range(G)]
        rollouts = sample(policy, asked)
        answers = [decode(ids) for ids in rollouts]
        rewards = torch.tensor([reward(p, a) for p, a in zip(asked, answers, strict=True)]).view(P, G)

        # One batch: the P demonstrations, then the P * G rollouts. A mask marks the tokens of a component.
        input_ids, attention_mask, completion_mask = pad(prompts + asked, demonstrations + rollouts)
        sft_mask = completion_mask & ~is_rollout
        rl_mask = adv_mask = completion_mask & is_rollout

        # The discriminator reads it once for two uses: detached as credit, and for its own loss below.
        logits = discriminator(input_ids, attention_mask)
        expert_logits, policy_logits = logits[:P], logits[P:].view(P, G)
        u = win_probability(policy_logits.detach(), expert_logits.detach())

        # Credit is relative to the group, so whatever all answers to a prompt share cancels out.
        credit = group_advantages(rewards, known)
        adversarial_credit = adversarial_advantages(policy_logits.detach(), expert_logits.detach(), known)
        advantages = torch.cat([torch.zeros(P), credit.flatten()])
        adversarial = torch.cat([torch.zeros(P), adversarial_credit.flatten()])

        # mu falls: lean on the expert while exploring is hopeless, on the reward once it is not.
        mu = warmup_cosine(step, warmup_steps=0, decay_steps=steps, peak=mu_peak, valley=mu_valley)
        logprobs = token_logprobs(policy, input_ids, attention_mask)
        # One update per batch: the policy that sampled is the one that learns, and every ratio is 1.
        old_logprobs = logprobs.detach()
        clip = {"clip_low": EPSILON, "clip_high": EPSILON}
        sums = {
            "sft": sft_loss(logprobs, sft_mask),
            "rl": clipped_surrogate(logprobs, old_logprobs, advantages, rl_mask, **clip),
            "adv": clipped_surrogate(logprobs, old_logprobs, adversarial, adv_mask, **clip),
        }
        weights = {"sft": mu, "rl": 1 - mu, "adv": lambda_adv}
        counts = {"sft": int(sft_mask.sum()), "rl": int(rl_mask.sum()), "adv": int(adv_mask.sum())}
        # Each sum is divided by its own count: more rollouts never drown the demonstrations.
        loss = objective(sums, weights, counts)
        update(policy, policy_optimizer, loss)

        # The expert's answer should beat each rollout of the same prompt. It learns after it has judged, or
        # the credit would come from a judge that has already seen these very answers.
        pairs = bradley_terry_loss(expert_logits.repeat_interleave(G), policy_logits.flatten())
        discriminator_loss = objective({"pairs": pairs}, {"pairs": 1.0}, {"pairs": P * G})
        update(discriminator, discriminator_optimizer, discriminator_loss)

        measured = {
            "reward": rewards.mean().item(),
            "right": sum(right_letters(p, a) for p, a in zip(asked, answers, strict=True)) / len(asked),
            "manner": sum(map(in_manner, answers)) / len(answers),
            "nll": sums["sft"].item() / counts["sft"],
            "win_rate": u.mean().item(),
            "mu": mu,
            "loss": loss.item(),
        }
        history.append(measured)
        if step % 10 == 0 or step == steps - 1:
            columns = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
            print(f"step {step:3d}  {columns}  {asked[0]}{answers[0]}", flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="UniAPL on one page: four letters, written backwards.")
    parser.add_argument("--steps", type=int, default=250)
    main(parser.parse_args().steps)
