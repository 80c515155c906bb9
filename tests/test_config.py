"""The schema of a run: every shipped config loads, and what is wrong is one line that names key, rule and way out."""

import copy
import datetime
from pathlib import Path

import pytest
import yaml

from tdds_dist.config import Config, Section, load_config, parse_config, to_dict
from tdds_dist.errors import InputError
from tdds_dist.tdds import Window

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

MINIMAL = {
    "run": {"name": "tiny"},
    "data": {"train": "a.beton", "val": "b.beton", "num_classes": 10, "image_size": 32, "crop": "pad",
             "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]},
    "model": {"name": "resnet18"},
    "train": {"epochs": 30, "global_batch_size": 64, "lr": 0.1},
    "score": {"windows": [{"T": 30, "K": 10, "pruning_rates": [0.0, 0.3]}, {"T": 20, "K": 5, "pruning_rates": [0.7]}]},
}


def changed(key: str, value: object) -> dict:
    """MINIMAL with one dotted key set."""
    tree = copy.deepcopy(MINIMAL)
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[leaf] = value
    return tree


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refused(tree: object, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        parse_config(tree, "my.yaml")
    assert "\n" not in str(caught.value)


# ---- what is accepted


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path):
    """Loads, may be collected, serves every rate it names, opens with a header, and survives a round trip."""
    config = load_config(path)
    config.check_collect()
    for setting in config.score.windows:
        for rate in setting.pruning_rates:
            assert config.window_for(rate) == config.window_of(setting)
    assert path.read_text().startswith("# ")
    plain = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert parse_config(plain) == config


def test_minimal_config_and_its_defaults(file):
    config = load_config(file)
    assert config.run.directory == Path("runs/tiny")
    assert load_config(file, ["run.dir=/elsewhere"]).run.directory == Path("/elsewhere")
    assert config.windows() == [Window(30, 10, 0.9), Window(20, 5, 0.9)]
    assert (config.score.preset, config.score.beta, config.score.view) == ("official", 0.9, "train")
    assert (config.collect.stop_after, config.retrain.importance) == ("schedule", "batch")


def test_round_trip_through_yaml(file):
    config = load_config(file, ["retrain.batch_size_rule={0.5: 0.5}", "score.windows=[{T: 4, K: 2, beta: 0.0}]",
                                "train.betas=[0.8, 0.9]", "run.dir=x/y"])
    assert config.retrain.batch_size_rule == {0.5: 0.5}
    plain = to_dict(config)
    assert parse_config(plain) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain, "plain data, lists instead of tuples"


def sections(model: type[Section]) -> list[type[Section]]:
    return [model, *(found for child in model.__subclasses__() for found in sections(child))]


@pytest.mark.parametrize("section", sections(Section)[1:], ids=lambda section: section.__name__)
def test_every_field_says_what_it_is(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            continue  # a section describes itself
        assert field.description, name
        assert field.description.strip().endswith("."), name
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"]


def test_a_config_is_immutable():
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(TypeError):
        config.score.windows[0] = None


def test_scientific_notation_that_yaml_takes_for_text(file):
    train = load_config(file, ["train.lr=1e-3", "train.weight_decay=5E-4"]).train
    assert (train.lr, train.weight_decay) == (1e-3, 5e-4)
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 2e-1"))
    assert load_config(file).train.lr == 0.2


def test_text_in_quotes_stays_text(file):
    """A run may be called 1e5, as commits are."""
    assert load_config(file, ['run.name="1e5"']).run.name == "1e5"


# ---- unknown, missing, of the wrong type


@pytest.mark.parametrize(("key", "nearest"), [
    ("trian", "train"), ("train.epoch", "epochs"), ("train.batch_size", "global_batch_size"),
    ("data.num_class", "num_classes"), ("train.nestrov", "nesterov"), ("score.window", "windows"),
    ("score.windows.0.pruning_rate", "pruning_rates"),
    ("score.windows.1.k", "K"), ("score.windows.0.t", "T"), ("retrain.importence", "importance"), ("run.nam", "name"),
    ("collect.stop", "stop_after"), ("model.Name", "name"), ("data.eval_crop", "eval_crop_ratio"),
])
def test_unknown_key_gives_the_nearest_valid_one(key, nearest):
    whole = ".".join([*key.split(".")[:-1], nearest])
    refused(changed(key, 1), rf"^my\.yaml: unknown key '{key}'; the nearest valid key is '{whole}' "
                             rf"\(valid: .*{nearest}")


@pytest.mark.parametrize("key", ["run", "data.train", "train.lr", "score.windows", "score.windows.0.K", "model.name"])
def test_missing_key(key):
    tree = copy.deepcopy(MINIMAL)
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    del node[leaf]
    refused(tree, rf"^my\.yaml: key '{key}' is missing; \S")


@pytest.mark.parametrize(("key", "value"), [
    ("train.lr", "fast"), ("train.lr", "0.1"), ("train.lr", True), ("train.lr", None), ("train.lr", 0),
    ("train.lr", -0.1), ("train.lr", float("nan")), ("train.epochs", 3.0), ("train.epochs", "30"),
    ("train.epochs", True), ("train.epochs", 0), ("train.nesterov", 1),
    ("train.nesterov", "yes"), ("train.optimizer", "lion"), ("train.momentum", 1.0),
    ("data.crop", "squash"), ("data.num_classes", 1), ("data.scale_min", 0.0), ("run.name", 5), ("run.name", "../up"),
    ("run.name", ""), ("run.seed", -1), ("score.preset", "papre"), ("score.beta", 1.5), ("score.windows.0.T", 0),
    ("score.windows.0.beta", -0.1), ("score.logp_dtype", "bfloat16"), ("retrain.batch_size_rule", [0.5]),
    ("run.name", datetime.date(2024, 1, 5)),
])
def test_value_of_a_wrong_type_or_range(key, value):
    refused(changed(key, value), rf"^my\.yaml: {key}=.*: .*; \S")


@pytest.mark.parametrize(("key", "value"), [
    ("data.mean", [1.0, 2.0]), ("data.mean", 5.0), ("data.std", [1.0, 2.0, "x"]), ("score.windows", []),
    ("score.windows", {"T": 3}), ("score.windows", [5]), ("train", 5), ("train", None), ("train", []),
    ("score.windows.0.pruning_rates", 0.3), ("retrain.batch_size_rule", {"half": 0.5}),
])
def test_value_of_a_wrong_shape_names_the_key(key, value):
    refused(changed(key, value), rf"^my\.yaml: (key ')?{key}\b")


@pytest.mark.parametrize(("key", "value"), [
    ("train.lr", float("inf")), ("train.weight_decay", float("inf")), ("data.mean", [float("nan")] * 3),
    ("data.std", [float("nan")] * 3), ("data.std", [float("inf")] * 3), ("run.timeout_seconds", float("inf")),
])
def test_numbers_must_be_finite(key, value):
    refused(changed(key, value), rf"^my\.yaml: {key}\b")


def test_keys_that_are_not_text():
    refused(MINIMAL | {5: 1}, r"^my\.yaml: .*5")


# ---- rules between keys


@pytest.mark.parametrize(("preset", "T", "K", "high"), [("official", 20, 21, 20), ("paper", 20, 20, 19)])
def test_window_longer_than_its_trajectory(preset, T, K, high):
    tree = changed("score.windows", [{"T": T, "K": K}])
    tree["score"]["preset"] = preset
    refused(tree, rf"K={K} must lie in \[\d, {high}\] for T={T} and preset '{preset}'; lower K or raise T")


def test_trajectory_longer_than_the_training():
    with pytest.raises(InputError, match=r"score\.windows: T=31 is longer than train\.epochs=30; lower T or train"):
        parse_config(changed("score.windows", [{"T": 31, "K": 10}])).check_collect()
    parse_config(changed("score.windows", [{"T": 30, "K": 10}])).check_collect()


@pytest.mark.parametrize(("key", "value", "match"), [
    ("score.windows.1.pruning_rates", [0.5, 1.0], r"score\.windows: pruning_rates=\[1\.0\] must lie in \[0, 1\)"),
    ("score.windows.1.pruning_rates", [-0.1], r"pruning_rates=\[-0\.1\] must lie in \[0, 1\)"),
    ("train.momentum", 0.0, r"train\.nesterov=true needs momentum; set train\.momentum=0\.9 or train\.nesterov=false"),
    ("train.warmup_epochs", 30.0, r"train\.warmup_epochs=30 must be less than train\.epochs=30"),
    ("data.std", [1.0, 0.0, 1.0], r"data\.std=\(1\.0, 0\.0, 1\.0\) must be positive"),
])
def test_rules_between_keys(key, value, match):
    refused(changed(key, value), match)


@pytest.mark.parametrize("key", ["train.mixup", "train.cutmix"])
def test_mixed_images_are_not_scored(key):
    tree = changed(key, 0.8)
    with pytest.raises(InputError, match=r"train\.mixup and train\.cutmix .*set score\.view=clean"):
        parse_config(tree).check_collect()
    tree["score"]["view"] = "clean"
    parse_config(tree).check_collect()
    parse_config(MINIMAL).check_collect()


def test_beta_of_a_window():
    """Its own, also when that is 0; else the one of all windows."""
    tree = changed("score.beta", 0.6)
    tree["score"]["windows"][1]["beta"] = 0.0
    assert parse_config(tree).windows() == [Window(30, 10, 0.6), Window(20, 5, 0.0)]


def test_window_of_a_pruning_rate():
    tree = changed("score.windows.1.beta", 0.5)
    config = parse_config(tree)
    assert config.window_for(0.3) == Window(30, 10, 0.9)
    assert config.window_for(0) == Window(30, 10, 0.9)
    assert config.window_for(0.1 + 0.2) == Window(30, 10, 0.9), "0.3 up to rounding"
    assert config.window_for(0.7) == Window(20, 5, 0.5)
    with pytest.raises(InputError, match=r"serves pruning_rate=0\.5 \(served: \[0\.0, 0\.3, 0\.7\]\); add .*--score"):
        config.window_for(0.5)


# ---- files and overrides


def test_missing_file_and_other_content(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path)
    path = tmp_path / "other.yaml"
    for content in (b"", b"- 1\n- 2\n", b"just text", b"5"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"other\.yaml must hold the sections run, data, model, train, score"):
            load_config(path)


@pytest.mark.parametrize("content", [
    b"run: [1,", b"a: b: c", b"\xff\xfe\x00\x01", b"run: {name: 'x", b"\tx: 1", b"{[1]: 2}", b"x: 2024-13-45",
    b"x: !!int abc"])
def test_file_that_is_no_plain_yaml(tmp_path, content):
    path = tmp_path / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("payload", [
    '!!python/object/apply:os.system ["touch {trap}"]', "!!python/object/apply:os.mkdir [{trap}]",
    "!!python/name:os.system", "!!python/object/new:os.mkdir [{trap}]", "!!python/module:os",
])
def test_yaml_tags_are_refused_and_not_executed(tmp_path, file, payload):
    trap = tmp_path / "trap"
    text = payload.format(trap=trap)
    path = tmp_path / "evil.yaml"
    path.write_text(file.read_text() + f"collect: {text}\n")
    with pytest.raises(InputError, match=r"evil\.yaml is not plain YAML"):
        load_config(path)
    with pytest.raises(InputError, match="not YAML"):
        load_config(file, [f"run.name={text}"])
    assert not trap.exists()


def test_overrides_of_nested_keys(file):
    config = load_config(file, [
        "train.lr=0.5", "collect.stop_after=last_window", "train.nesterov=false", "data.mean=[7, 8, 9.5]",
        "score.windows=[{T: 3, K: 2, pruning_rates: [0.9]}]", "train.lr=0.25"])
    assert config.train.lr == 0.25, "the last one wins"
    assert config.collect.stop_after == "last_window"
    assert config.train.nesterov is False
    assert config.windows() == [Window(3, 2, 0.9)]
    assert config.data.mean == (7.0, 8.0, 9.5)
    assert config.train.epochs == 30, "neighbours stay"


def test_an_override_value_may_hold_an_equals_sign(file):
    assert load_config(file, ["data.train=/data/a=b.beton"]).data.train == "/data/a=b.beton"


@pytest.mark.parametrize(("override", "match"), [
    ("train.lr", r"override 'train\.lr' must look like section\.key=value"),
    ("", r"override '' must look like"),
    ("--lr", r"override '--lr' must look like"),
    ("train.lr.x=1", r"override 'train\.lr\.x' goes through something that is not a section"),
    ("score.windows.0.T=5", r"override 'score\.windows\.0\.T' goes through something that is not a section"),
    ("train.lr=[1", r"override 'train\.lr=\[1': the value is not YAML"),
    ("run.name=2024-13-45", r"override 'run\.name=2024-13-45': the value is not YAML"),
    ("train.lr=fast", r"train\.lr='fast'"),
    ("train.lrr=1", r"unknown key 'train\.lrr'; the nearest valid key is 'train\.lr'"),
    ("trian.lr=1", r"unknown key 'trian'; the nearest valid key is 'train'"),
    ("=1", r"unknown key ''"),
    ("train.lr=", r"train\.lr=None"),
    ("train=5", r"train=5: .*it has the keys epochs"),
])
def test_override_that_does_not_fit(file, override, match):
    with pytest.raises(InputError, match=match):
        load_config(file, [override])


def test_overrides_are_checked_together(file):
    """Each alone would break a rule."""
    config = load_config(file, ["train.momentum=0.0", "train.nesterov=false"])
    assert isinstance(config, Config)


# ---- images that grow


GROWING = {"start_size": 16, "from_epoch": 2, "to_epoch": 20}


@pytest.mark.parametrize(("change", "match"), [
    ({"crop": "pad"}, r"data\.progressive resizes images, and data\.crop=pad does not; use data\.crop=resized, or leave"),
    ({"start_size": 33}, r"start_size=33 is larger than data\.image_size=32.*lower the first or raise the second"),
    ({"from_epoch": 20}, r"from_epoch=20 must be less than to_epoch=20"),
    ({"to_epoch": 30}, r"to_epoch=30 must be less than train\.epochs=30 \(the last epoch is 29\).*lower it"),
    ({"start_size": 7}, r"data\.progressive\.start_size=7"),
    ({"multiple": 0}, r"data\.progressive\.multiple=0"),
    ({"until": 3}, r"unknown key 'data\.progressive\.until'"),
    ({"eval_size": 7}, r"data\.eval_size=7 must be at least 8, or 0 for data\.image_size=32"),
])
def test_growth_that_cannot_be(change, match):
    tree = copy.deepcopy(MINIMAL)
    of_data = {key: value for key, value in change.items() if key in ("crop", "eval_size")}
    rest = {key: value for key, value in change.items() if key not in of_data}
    tree["data"] |= {"crop": "resized", "progressive": GROWING | rest} | of_data
    refused(tree, match)


def test_growth_by_overrides(file):
    start = ["data.crop=resized", "data.progressive={start_size: 16, from_epoch: 2, to_epoch: 20}"]
    config = load_config(file, [*start, "data.progressive.multiple=4", "data.eval_size=40"])
    assert config.data.progressive.model_dump() == GROWING | {"multiple": 4}
    assert config.data.eval_size == 40
    assert load_config(file, [*start, "data.progressive="]).data.progressive is None
    refused(changed("data.progressive", {"start_size": 16}), r"key .data\.progressive\.from_epoch. is missing; from_epoch")


@pytest.mark.parametrize(("key", "value"), [("model.compile", "yes"), ("train.fused_optimizer", "auto")])
def test_switches_are_true_or_false(key, value):
    refused(changed(key, value), rf"^my\.yaml: {key}=.*: .*; \S")
