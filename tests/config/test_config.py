"""The schema of a run: every shipped config loads, and what is wrong is one line that names key,
rule and way out."""

import copy
import datetime
from pathlib import Path

import pytest
import yaml

from tdds_dist.config.run import Section, load_config, parse_config, to_dict
from tdds_dist.config.scores import Window
from tdds_dist.errors import InputError
from tests.make import table

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
assert CONFIGS

MINIMAL = yaml.safe_load("""
run: {name: tiny}
data: {train: a.beton, val: b.beton, num_classes: 10, image_size: 32, crop: pad,
       mean: [1.0, 2.0, 3.0], std: [4.0, 5.0, 6.0]}
model: {name: resnet18}
train: {epochs: 30, global_batch_size: 64, lr: 0.1}
score: {windows: [{T: 30, K: 10, pruning_rates: [0.0, 0.3]}, {T: 20, K: 5, pruning_rates: [0.7]}]}
""")


DELETED = object()


def changed(changes: dict[str, object]) -> dict:
    """MINIMAL with some dotted keys set, or `DELETED`."""
    tree = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[leaf] = value
        if value is DELETED:
            del node[leaf]
    return tree


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


# ---- what is accepted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path):
    """Loads, may be collected, serves every rate it names, opens with a header, and survives a
    round trip."""
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
    some = ["retrain.batch_size_rule={0.5: 0.5}", "score.windows=[{T: 4, K: 2, beta: 0.0}]"]
    config = load_config(file, [*some, "train.betas=[0.8, 0.9]", "run.dir=x/y"])
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


def test_text_that_yaml_and_people_read_differently(file):
    """YAML takes 1e-3 for text; a run may be called 1e5, as commits are."""
    train = load_config(file, ["train.lr=1e-3", "train.weight_decay=5E-4"]).train
    assert (train.lr, train.weight_decay) == (1e-3, 5e-4)
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 2e-1"))
    assert load_config(file).train.lr == 0.2
    assert load_config(file, ['run.name="1e5"']).run.name == "1e5"
    assert load_config(file, ["data.train=/data/a=b.beton"]).data.train == "/data/a=b.beton"


# ---- what is refused


NAN, INF = float("nan"), float("inf")
GROWING = {"start_size": 16, "from_epoch": 2, "to_epoch": 20}


def growing(**changes: object) -> dict[str, object]:
    return {"data.crop": "resized", "data.progressive": GROWING | changes}


# -> the nearest valid key
UNKNOWN = table("""
trian -> train
train.epoch -> epochs
train.batch_size -> global_batch_size
data.num_class -> num_classes
train.nestrov -> nesterov
score.window -> windows
score.windows.0.pruning_rate -> pruning_rates
score.windows.1.k -> K
score.windows.0.t -> T
retrain.importence -> importance
run.nam -> name
collect.stop -> stop_after
model.Name -> name
data.eval_crop -> eval_crop_ratio
""")
MISSING = ["run", "data.train", "train.lr", "score.windows", "score.windows.0.K", "model.name"]
WRONG_VALUE = {  # a wrong type, or outside the range
    "train.lr": ["fast", "0.1", True, None, 0, -0.1, NAN],
    "train.epochs": [3.0, "30", True, 0],
    "train.nesterov": [1, "yes"],
    "train.optimizer": ["lion"],
    "train.momentum": [1.0],
    "train.fused_optimizer": ["auto"],
    "model.compile": ["yes"],
    "data.crop": ["squash"],
    "data.num_classes": [1],
    "data.scale_min": [0.0],
    "run.seed": [-1],
    "run.name": [5, "../up", "", datetime.date(2024, 1, 5)],
    "score.preset": ["papre"],
    "score.beta": [1.5],
    "score.windows.0.T": [0],
    "score.windows.0.beta": [-0.1],
    "score.logp_dtype": ["bfloat16"],
    "retrain.batch_size_rule": [[0.5]],
}
WRONG_SHAPE = {  # or numbers that are not finite
    "data.mean": [[1.0, 2.0], 5.0, [NAN] * 3],
    "data.std": [[1.0, 2.0, "x"], [NAN] * 3, [INF] * 3],
    "train": [5, None, []],
    "score.windows": [[], {"T": 3}, [5]],
    "score.windows.0.pruning_rates": [0.3],
    "retrain.batch_size_rule": [{"half": 0.5}],
    "train.lr": [INF],
    "train.weight_decay": [INF],
    "run.timeout_seconds": [INF],
}
# changes -> what is said
RULES = table(r"""
{score.windows: [{T: 20, K: 21}]} -> K=21 must lie in \[\d, 20\] for T=20 and preset 'official'; lower K or raise T
{score.windows: [{T: 20, K: 20}], score.preset: paper} -> K=20 must lie in \[\d, 19\] for T=20 and preset 'paper'
{score.windows.1.pruning_rates: [0.5, 1.0]} -> score\.windows: pruning_rates=\[1\.0\] must lie in \[0, 1\)
{score.windows.1.pruning_rates: [-0.1]} -> pruning_rates=\[-0\.1\] must lie in \[0, 1\)
{train.momentum: 0.0} -> train\.nesterov=true needs momentum; set train\.momentum=0\.9 or train\.nesterov=false
{train.warmup_epochs: 30.0} -> train\.warmup_epochs=30 must be less than train\.epochs=30
{data.std: [1.0, 0.0, 1.0]} -> data\.std=\(1\.0, 0\.0, 1\.0\) must be positive
{data.progressive: {start_size: 16}} -> key .data\.progressive\.from_epoch. is missing; from_epoch
""")
# keys of data.progressive -> what is said
PROGRESSIVE = table(r"""
{start_size: 33} -> start_size=33 is larger than data\.image_size=32.*lower the first or raise the second
{from_epoch: 20} -> from_epoch=20 must be less than to_epoch=20
{to_epoch: 30} -> to_epoch=30 must be less than train\.epochs=30 \(the last epoch is 29\).*lower it
{start_size: 7} -> data\.progressive\.start_size=7
{multiple: 0} -> data\.progressive\.multiple=0
{until: 3} -> unknown key 'data\.progressive\.until'
""")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        *(
            (
                {key: 1},
                rf"^my\.yaml: unknown key '{key}'; the nearest valid key is "
                rf"'{'.'.join([*key.split('.')[:-1], nearest])}' \(valid: .*{nearest}",
            )
            for key, nearest in UNKNOWN
        ),
        *(({key: DELETED}, rf"^my\.yaml: key '{key}' is missing; \S") for key in MISSING),
        *(
            ({key: value}, rf"^my\.yaml: {key}=.*: .*; \S")
            for key, values in WRONG_VALUE.items()
            for value in values
        ),
        *(
            ({key: value}, rf"^my\.yaml: (key ')?{key}\b")
            for key, values in WRONG_SHAPE.items()
            for value in values
        ),
        (
            {"train.lr": DELETED, "train.learning_rate": 0.05},
            "unknown key 'train.learning_rate'; the nearest valid key is 'train.lr'",
        ),
        *((yaml.safe_load(changes), match) for changes, match in RULES),
        (
            growing() | {"data.crop": "pad"},
            r"data\.progressive resizes images, and data\.crop=pad does not; use data\.crop=resized, or leave",
        ),
        *((growing(**yaml.safe_load(changes)), match) for changes, match in PROGRESSIVE),
        (
            growing() | {"data.eval_size": 7},
            r"data\.eval_size=7 must be at least 8, or 0 for data\.image_size=32",
        ),
    ],
)
def test_what_is_wrong_is_one_line(changes, match):
    with pytest.raises(InputError, match=match) as caught:
        parse_config(changed(changes), "my.yaml")
    assert "\n" not in str(caught.value)


def test_keys_that_are_not_text():
    with pytest.raises(InputError, match=r"^my\.yaml: .*5"):
        parse_config(MINIMAL | {5: 1}, "my.yaml")


# ---- windows, and what only a collection refuses


@pytest.mark.parametrize(
    ("wrong", "right", "match"),
    [
        (
            {"score.windows": [{"T": 31, "K": 10}]},
            {"score.windows": [{"T": 30, "K": 10}]},
            r"score\.windows: T=31 is longer than train\.epochs=30; lower T or train",
        ),
        *(
            (
                {key: 0.8},
                {key: 0.8, "score.view": "clean"},
                r"train\.mixup and train\.cutmix .*set score\.view=clean",
            )
            for key in ("train.mixup", "train.cutmix")
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_a_collection(wrong, right, match):
    with pytest.raises(InputError, match=match):
        parse_config(changed(wrong)).check_collect()
    parse_config(changed(right)).check_collect()


def test_beta_of_a_window():
    """Its own, also when that is 0; else the one of all windows."""
    config = parse_config(changed({"score.beta": 0.6, "score.windows.1.beta": 0.0}))
    assert config.windows() == [Window(30, 10, 0.6), Window(20, 5, 0.0)]


def test_window_of_a_pruning_rate():
    config = parse_config(changed({"score.windows.1.beta": 0.5}))
    assert config.window_for(0.3) == Window(30, 10, 0.9)
    assert config.window_for(0) == Window(30, 10, 0.9)
    assert config.window_for(0.1 + 0.2) == Window(30, 10, 0.9), "0.3 up to rounding"
    assert config.window_for(0.7) == Window(20, 5, 0.5)
    not_served = r"serves pruning_rate=0\.5 \(served: \[0\.0, 0\.3, 0\.7\]\); add .*--score"
    with pytest.raises(InputError, match=not_served):
        config.window_for(0.5)


# ---- files and overrides


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"other\.yaml does not exist"),
        ("a folder", r"other\.yaml does not exist"),
        *(
            (content, r"other\.yaml must hold the sections run, data, model, train, score")
            for content in (b"", b"- 1\n- 2\n", b"just text", b"5")
        ),
        *(
            (content, r"other\.yaml")
            for content in (
                *(b"run: [1,", b"a: b: c", b"\xff\xfe\x00\x01", b"run: {name: 'x"),
                *(b"\tx: 1", b"{[1]: 2}", b"x: 2024-13-45", b"x: !!int abc"),
            )
        ),
    ],
)
def test_a_file_that_holds_no_config(tmp_path, content, match):
    path = tmp_path / "other.yaml"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [
        '!!python/object/apply:os.system ["touch {trap}"]',
        "!!python/object/apply:os.mkdir [{trap}]",
        "!!python/name:os.system",
        "!!python/object/new:os.mkdir [{trap}]",
        "!!python/module:os",
    ],
)
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


def test_a_key_of_a_file_stands_once(file):
    file.write_text(file.read_text() + "  lr: 1.5\n")
    with pytest.raises(InputError, match=r"key 'lr' stands twice, in lines \d+ and \d+; keep one"):
        load_config(file)


def test_text_stays_the_text_it_is(file, monkeypatch):
    """Dates are text, quotes make text of everything, and paths know `~` and variables."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = load_config(
        file, ["run.name=2026-01-31", "run.dir=~/a", "data.train=$DATA/t", "data.val=${DATA}/v"]
    )
    assert config.run.name == "2026-01-31"
    assert config.run.dir == "/home/me/a"
    assert (config.data.train, config.data.val) == ("/data/t", "/data/v")
    assert load_config(file, ["run.name='010'"]).run.name == "010"


def test_overrides_of_nested_keys(file):
    words = "train.lr=0.5 collect.stop_after=last_window train.nesterov=false data.mean=[7,8,9.5]"
    windows = "score.windows=[{T: 3, K: 2, pruning_rates: [0.9]}]"
    config = load_config(file, [*words.split(), windows, "train.lr=0.25"])
    assert config.train.lr == 0.25, "the last one wins"
    assert config.collect.stop_after == "last_window"
    assert config.train.nesterov is False
    assert config.windows() == [Window(3, 2, 0.9)]
    assert config.data.mean == (7.0, 8.0, 9.5)
    assert config.train.epochs == 30, "neighbours stay"


@pytest.mark.parametrize(
    ("override", "match"),
    table(r"""
    train.lr -> override 'train\.lr' must look like section\.key=value
    -> override '' must look like
    --lr -> override '--lr' must look like
    train.lr.x=1 -> override 'train\.lr\.x' goes through something that is not a section
    score.windows.0.T=5 -> override 'score\.windows\.0\.T' goes through something that is not a section
    train.lr=[1 -> override 'train\.lr=\[1': the value is not YAML
    run.name=no -> run\.name=False: must be text \(yes, no, .*run\.name="'TEXT'"
    run.name=2024 -> run\.name=2024: must be text; put it in quotes
    run.seed=010 -> override 'run\.seed=010': 010, in line 1, is the octal number 8
    run.timeout_seconds=4:30 -> 4:30, in line 1, is a number of base 60
    data.progressive={start_size: 64, from_epoch: 0, start_size: 96} -> 'start_size' stands twice
    run.dir=$NOT_SET/x -> \$NOT_SET is not set
    data.val=~nobody-here/x -> ~nobody-here has no home
    train.lr=fast -> train\.lr='fast'
    train.lrr=1 -> unknown key 'train\.lrr'; the nearest valid key is 'train\.lr'
    trian.lr=1 -> unknown key 'trian'; the nearest valid key is 'train'
    =1 -> unknown key ''
    train.lr= -> train\.lr=None
    train=5 -> train=5: .*it has the keys epochs
    """),
)
def test_override_that_does_not_fit(file, override, match):
    with pytest.raises(InputError, match=match):
        load_config(file, [override])


def test_overrides_are_checked_together(file):
    """Each alone would break a rule."""
    assert load_config(file, ["train.momentum=0.0", "train.nesterov=false"]).train.momentum == 0
    start = ["data.crop=resized", "data.progressive={start_size: 16, from_epoch: 2, to_epoch: 20}"]
    config = load_config(file, [*start, "data.progressive.multiple=4", "data.eval_size=40"])
    assert config.data.progressive.model_dump() == GROWING | {"multiple": 4}
    assert config.data.eval_size == 40
    assert load_config(file, [*start, "data.progressive="]).data.progressive is None
