"""`--help` and `--help-all` of the verbs whose flags are the keys of a recipe, without heavy imports."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from uniapl.cli import EXIT_CODES, HELP_FLAGS, VERBS
from uniapl.config import Config
from uniapl.config.resolve import flatten, load_recipe, resolve

WIDTH = 100
KEY_WIDTH = 42
KEYS = """
    method model.model_name_or_path model.lora_r data.path data.prompt_format rewards.functions
    evaluation.suites output_dir resume seed max_steps save_steps eval_steps batching.prompts_per_step
    batching.demonstrations_per_step rollout.num_generations rollout.max_completion_length rollout.sampler
    optim.learning_rate objective.mu_peak objective.lambda_adv objective.beta discriminator.kind
""".split()
DEMO_OPTIONS = """
--task sentences    {sentences}
--task tools        {tools}
--reward NAME       {rewards};
                    only the first is right (--task sentences)
--write DIRECTORY   write the task and its recipe as files, for `uniapl compare`, and do not train
"""
RECIPE_ONLY = ("stages",)


def short_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for a verb with many options, whose help has a short usage and few lines per option."""
    return argparse.ArgumentParser(
        prog=f"uniapl {verb}",
        usage=f"uniapl {verb} {VERBS[verb].usage}",
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=33, width=WIDTH),
    )


def recipe_help(verb: str, arguments: Sequence[str]) -> None:
    """Print the most important keys, or all of them, with the values of the recipe and of the flags.

    Raises:
        UsageError: The recipe or a flag is not valid.
    """
    flags = [a for a in arguments if a not in (*HELP_FLAGS, "--quiet", "--json")]
    recipe: dict[str, Any] = {}
    options = ""
    if verb == "demo":
        from uniapl.demo.options import TASKS, demo_options
        from uniapl.demo.recipe import RECIPE, REWARDS, TOOLS_RECIPE

        chosen, flags = demo_options(flags)
        recipe = TOOLS_RECIPE if chosen.task == "tools" else RECIPE
        options = DEMO_OPTIONS.format(rewards=", ".join(REWARDS), **TASKS)
    elif flags and not flags[0].startswith("-"):
        recipe = load_recipe(flags.pop(0))
    if "--help-all" in arguments:
        print("\n".join(f"{key} (in the recipe only): {_field(key).description}" for key in RECIPE_ONLY))
        print(f"--rewards.functions NAME ...: {_field('rewards.functions').description}")
        flags.append("--help")
    values = flatten(resolve(recipe, flags).config)
    keys = "\n".join(_lines(f"{key}: {_text(values[key])}", summary(_field(key))) for key in KEYS)
    print(
        f"""\
usage: uniapl {verb} {VERBS[verb].usage}

{VERBS[verb].summary}
{options}
The most important keys of a recipe, with their values. Each is also a flag: --max-steps 60
{keys}

--help-all lists every key with its full description.
{EXIT_CODES}""",
        end="",
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(item['name'] if isinstance(item, dict) else item for item in value)}]"
    return "null" if value is None else str(value)


def _lines(key: str, text: str) -> str:
    """A key with its value, and its summary in a column next to it."""
    key = key if len(key) <= KEY_WIDTH else key[: KEY_WIDTH - 3] + "..."
    first, *others = textwrap.wrap(text, WIDTH - KEY_WIDTH - 3, break_on_hyphens=False)
    return "\n".join([f"  {key:<{KEY_WIDTH}} {first}", *(f"{'':<{KEY_WIDTH + 3}}{line}" for line in others)])


def summary(field: Any) -> str:
    """The beginning of a key's description, up to the first semicolon or period, and its choices."""
    beginning = re.split(r"[;.](?: |$)", field.description)[0]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return beginning + (f": {', '.join(choices)}" if choices else "")


def _field(key: str) -> Any:
    model: Any = Config
    *sections, leaf = key.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[leaf]
