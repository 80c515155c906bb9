"""The table of what each key of a config decides, and the three questions that it answers.

1. May a run that is there go on? It may when `differences` is empty (`entry` asks, and looks at its
   checkpoints too).
2. Is a result that is there what is asked for? It is when `differences` is empty (`experiment` and
   `tdds submit` ask).
3. Are two runs seeds of one setting? They are when `setting_of` gives the same for both (tables and
   the report ask).

The first two have one answer: a run that may go on ends with the result that is asked for.
"""

import json
from typing import Any

from tdds_dist.config.run import Config, parse_config, to_dict
from tdds_dist.runs.directory import RunDir

PLACE = "place"  # names, places, speed, what is kept or logged: changes no result
# between two starts of a run; but runs that differ in it are not averaged
MAY_CHANGE = "may change"
SEED = "seed"  # decides the result, and is what seeds of one setting differ in
DECIDES = "decides"  # every key that the table does not name

KINDS: dict[str, str | dict[str, str]] = {
    "run": {
        "name": PLACE,
        "dir": PLACE,
        "device": PLACE,
        "timeout_seconds": PLACE,
        "trackers": PLACE,
        "seed": SEED,
    },
    # the files by name; their content is compared
    "data": {"train": PLACE, "val": PLACE, "cache": PLACE, "num_workers": PLACE},
    "train": {
        "accumulation": MAY_CHANGE,
        "log_every": PLACE,
        "eval_every": MAY_CHANGE,
        "static_graph": MAY_CHANGE,
    },
    "score": {
        "baselines": PLACE,
        "final_pass": MAY_CHANGE,
        "on_nan": MAY_CHANGE,
        "route_every": PLACE,
    },
    "retrain": PLACE,
    "checkpoint": PLACE,
    "pipeline": PLACE,
    "prune": PLACE,
}
# what the table says otherwise of a retraining
_OF_RETRAIN: dict[str, str | dict[str, str]] = {
    "score": PLACE,
    "collect": PLACE,
    # these are in its train.* and its record
    "retrain": {"epochs": PLACE, "importance": PLACE, "batch_size_rule": PLACE},
}
# a pruned training may choose by a baseline
_SCORE_OF_TRAIN = {"final_pass": MAY_CHANGE, "on_nan": MAY_CHANGE, "route_every": PLACE}
# keys of env.json that decide the result as well
_OF_RECORD = ("stage", "strategy", "importance", "coreset_sha256")


def _kinds(stage: str) -> dict[str, str | dict[str, str]]:
    if stage == "train":  # a pruned training, which never stops early
        return KINDS | {"collect": PLACE, "score": _SCORE_OF_TRAIN, "prune": {"twin_of": SEED}}
    return KINDS if stage == "collect" else KINDS | _OF_RETRAIN


def kind_of(section: str, key: str, stage: str = "collect") -> str:
    """Return what a key of the config decides in a run of this stage."""
    kinds = _kinds(stage).get(section, {})
    return kinds if isinstance(kinds, str) else kinds.get(key, DECIDES)


def changeable_keys(stage: str) -> str:
    """Return the keys that may change between two starts of a run, as a person reads them."""
    names: list[str] = []
    for section, kinds in _kinds(stage).items():
        if isinstance(kinds, str):
            names.append(f"{section}.*")
        else:
            may = (PLACE, MAY_CHANGE)
            names += [f"{section}.{key}" for key, kind in kinds.items() if kind in may]
    return ", ".join(names)


def differences(run: RunDir, config: Config, setting: dict[str, Any]) -> list[str]:
    """Return what the run that is there was asked for otherwise, one `section.key was X, now Y`
    each.

    `config` is the resolved one, `setting` what else decides the result: the keys of the record,
    and under `data` the content of the images where it is known. A key that the config of an older
    version lacks has its default.

    Raises:
        InputError: the config of the run cannot be read.
    """
    env, before = run.read_env(), to_dict(parse_config(run.read_config(), str(run.config_file)))
    changed = [
        f"{key} was {env.get(key)!r}, now {setting.get(key)!r}"
        for key in _OF_RECORD
        if env.get(key) != setting.get(key)
    ]
    for section, values in to_dict(config).items():
        for key, now in values.items():
            was = before[section].get(key)
            if kind_of(section, key, setting["stage"]) in (PLACE, MAY_CHANGE):
                continue
            # which rates a window serves may change, but where it says when pruning begins
            if (section, key) == ("score", "windows") and setting["stage"] != "train":
                was, now = (
                    [{**window, "pruning_rates": ()} for window in windows]
                    for windows in (was, now)
                )
            if (section, key) == ("score", "trajectory") and was and not now:
                continue  # a run may go on without a trajectory, but not begin one half-way
            if was != now:
                changed.append(f"{section}.{key} was {was!r}, now {now!r}")
    # the images by content, and by name where the content of either is not known
    images_before, images = env.get("data"), setting.get("data")
    for key in ("train", "val"):
        was, now = before["data"][key], getattr(config.data, key)
        if not (images_before and images):
            changed += [f"data.{key} was {was!r}, now {now!r}"] * (was != now)
        elif key in images_before and images_before[key] != images[key]:
            changed.append(
                f"it was started with other images than data.{key}={now} holds now (the fingerprint"
                " of the content differs)"
            )
    return changed


def setting_of(config: dict[str, Any], stage: str = "collect") -> dict[str, str]:
    """Return what decides the result of a run of this stage but for its seed, by `section.key`;
    values as text.

    `config` is what config.yaml says, also of an older version: a key that it lacks has its
    default.
    """
    found = {}
    defaults = {
        section: {
            key: field.default
            for key, field in of.annotation.model_fields.items()  # type: ignore[union-attr]
            if not field.is_required()
        }
        for section, of in Config.model_fields.items()
    }
    for section in dict.fromkeys([*defaults, *config]):
        given = config.get(section)
        for key, value in (
            defaults.get(section, {}) | (given if isinstance(given, dict) else {})
        ).items():
            if kind_of(section, key, stage) in (MAY_CHANGE, DECIDES):
                found[f"{section}.{key}"] = (
                    value
                    if isinstance(value, str)
                    else json.dumps(value, sort_keys=True, default=str)
                )
    return found
