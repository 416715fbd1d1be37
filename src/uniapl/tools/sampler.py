"""A sampler whose rollouts call tools."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from uniapl.config import Config
from uniapl.data.rendering import ChatTemplate
from uniapl.rollout import Sampler, SampleRequest
from uniapl.tools.calls import CallParser
from uniapl.tools.functions import Tool
from uniapl.tools.trajectories import Toolbox, sample_trajectories
from uniapl.types import Rollout


@dataclass(frozen=True, kw_only=True)
class ToolSampler:
    """Samples turns with another sampler and calls tools between them."""

    sampler: Sampler
    toolbox: Toolbox
    max_completion_length: int
    """Tokens of all turns and results together."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt, in the order of the prompts."""
        return sample_trajectories(
            self.sampler, request, self.toolbox, max_completion_length=self.max_completion_length
        )

    def check(self) -> None:
        """See :class:`Sampler`."""
        self.sampler.check()


def with_tools(
    sampler: Sampler,
    tools: Sequence[Tool],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    *,
    max_completion_length: int,
) -> Sampler:
    """The sampler, whose rollouts call the tools; without tools, the sampler itself.

    Args:
        max_completion_length: Tokens of all turns and results together.

    Raises:
        UsageError: The calls that the chat template writes cannot be read.
    """
    if not tools:
        return sampler
    form = ChatTemplate(
        tokenizer=tokenizer,
        arguments=config.data.chat_template_kwargs,
        tools=[dict(tool.schema) for tool in tools],
    )
    toolbox = Toolbox(
        tools={tool.name: tool for tool in tools},
        parser=CallParser.of(form, stop_ids),
        form=form,
        stop_ids=stop_ids,
        max_iterations=config.rollout.max_tool_calling_iterations or max_completion_length,
        timeout=config.rollout.tool_timeout,
        max_characters=config.rollout.max_tool_result_length,
    )
    return ToolSampler(sampler=sampler, toolbox=toolbox, max_completion_length=max_completion_length)
