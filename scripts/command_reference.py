"""Prints docs/commands.md, made from the command line's own help: `python
scripts/command_reference.py > docs/commands.md`."""

import argparse
from collections.abc import Iterator

from tdds_dist.__main__ import COMMANDS
from tdds_dist.cli.parser import build_parser

HEAD = """\
# Every command and option

<!-- Made by `python scripts/command_reference.py > docs/commands.md`. Change the texts where the options are defined. -->

`tdds STAGE --help` says the same. What a config holds is in [configs.md](configs.md).
"""


def page() -> str:
    """The text of docs/commands.md."""
    parser = build_parser(COMMANDS)
    (stages,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    common = {option for action in parser._actions for option in action.option_strings}
    summary = {choice.dest: choice.help or "" for choice in stages._choices_actions}
    parts = [
        HEAD,
        "## Every stage\n",
        _table([action for action in parser._actions if action is not stages]),
    ]
    for name, stage in stages.choices.items():
        parts += [f"## `tdds {name}`\n", *_text_of(stage, summary[name])]
        parts.append(
            _table([action for action in stage._actions if not common & set(action.option_strings)])
        )
    return "\n".join(parts)


def _text_of(stage: argparse.ArgumentParser, summary: str) -> Iterator[str]:
    is_laid_out = stage.formatter_class is not argparse.HelpFormatter
    for text in filter(None, (stage.description or summary, stage.epilog)):
        paragraphs = text.split("\n\n") if is_laid_out else [" ".join(text.split())]
        for paragraph in paragraphs:
            if "\n" in paragraph and "  " in paragraph:  # columns
                yield "\n".join(f"    {line}" for line in paragraph.splitlines()) + "\n"
            else:
                yield f"{_escaped(' '.join(paragraph.split()))}\n"


def _table(actions: list[argparse.Action]) -> str:
    rows = [
        f"| {_name(action)} | {_escaped((action.help or '') % vars(action))} |"
        for action in actions
    ]
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"


def _name(action: argparse.Action) -> str:
    """The option as it is typed, with what it takes."""
    value = action.metavar or (
        f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    )
    value = str(value) if action.option_strings else str(action.metavar or action.dest)
    takes = action.nargs != 0
    value = (
        {"+": f"{value} ...", "*": f"[{value} ...]", "?": f"[{value}]"}.get(
            str(action.nargs), value
        )
        if takes
        else ""
    )
    names = action.option_strings or [""]
    return ", ".join("`" + f"{name} {value}".strip().replace("|", "\\|") + "`" for name in names)


def _escaped(words: str) -> str:
    """Plain text as Markdown: outside of backticks `<name>` is no tag and a star no emphasis; a bar
    ends no cell."""
    parts = words.replace("|", "\\|").split("`")
    return "`".join(
        part if inside % 2 else part.replace("<", "\\<").replace("*", "\\*")
        for inside, part in enumerate(parts)
    )


if __name__ == "__main__":
    print(page(), end="")
