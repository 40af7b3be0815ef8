"""One schema: which layer wins, what a word on the command line means, and what is refused."""

import pytest
import yaml

from stepcredit.cli.arguments import SHORT, parse
from stepcredit.config import Config, dump_yaml, merge, parse_value, read_yaml, resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.demo.recipe import EMBEDDED_CREDIT, EMBEDDED_RECIPE
from stepcredit.errors import UserError

OWN = {"config": None, "resume": "never"}


# ---------------------------------------------------------------------- layers


def test_schema_is_the_lowest_layer():
    config = resolve({"model": "my-model", "algorithm": "rloo"})
    assert config.optim.learning_rate == 1e-6
    assert config.train.iterations == 100
    assert config.objective == Config().objective


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_over_schema(name):
    """Credit function, its options and the objective follow the algorithm."""
    config, row = resolve({"model": "my-model", "algorithm": name}), ALGORITHMS[name]
    assert (config.algorithm, config.credit.name) == (name, row.credit)
    written = config.credit.model_dump(mode="json")
    assert {key: value for key, value in written.items() if key != "name"} == dict(row.credit_options)
    for section, given in ((config.objective, row.objective), (config.growth, row.growth)):
        found = section.model_dump()
        assert all(
            found[key] == (found[key] | value if isinstance(value, dict) else value) for key, value in given.items()
        )


def test_recipe_of_the_embedded_model_over_algorithm():
    config = resolve({"algorithm": "spro"})
    for section, values in EMBEDDED_RECIPE.items():
        assert {key: getattr(getattr(config, section), key) for key in values} == values
    assert config.optim.learning_rate != Config().optim.learning_rate
    assert config.credit.options == EMBEDDED_CREDIT["spro"]
    assert config.objective.aggregate == "seq_mean_token_mean"


def test_yaml_over_recipe_and_flags_over_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("algorithm: spro\ntrain: {iterations: 7, seed: 3}\ncredit: {beta: 0.5}\n")
    given, _ = parse([str(tmp_path / "run.yaml"), "--train.seed", "4", "--group-size", "2"], OWN, "train")
    config = resolve(given)
    assert (config.train.iterations, config.train.seed, config.growth.group_size) == (7, 4, 2)
    assert config.credit.model_dump() == {"name": "spro", "beta": 0.5}
    assert config.optim.learning_rate == EMBEDDED_RECIPE["optim"]["learning_rate"]  # left alone


def test_flags_win_whatever_their_order(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {seed: 3}\n")
    for words in (["--seed", "4", str(tmp_path / "run.yaml")], [str(tmp_path / "run.yaml"), "--seed", "4"]):
        assert parse(words, OWN, "train")[0] == {"train": {"seed": 4}}


@pytest.mark.parametrize("model", ["embedded", "my-model"])
@pytest.mark.parametrize("credit", [name for name in ALGORITHMS if name != "spro"])
def test_options_of_spro_do_not_leak(credit, model):
    """Another credit function under --algorithm spro starts from its own defaults."""
    config = resolve({"algorithm": "spro", "model": model, "credit": {"name": credit}})
    assert config.credit.model_dump() == {"name": credit}


@pytest.mark.parametrize("given", [{"name": "spro"}, {"cumsum": False}, {}])
def test_options_of_spro_stay_with_spro(given):
    config = resolve({"algorithm": "spro", "model": "my-model", "credit": given})
    assert config.credit.options == {"beta": 0.05} | {k: v for k, v in given.items() if k != "name"}


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3), ("-3", -3), ("1e-6", 1e-6), ("0.5", 0.5), ("-.5", -0.5), ("true", True), ("False", False),
        ("null", None), ("[1, 2]", [1, 2]), ("{a: b}", {"a": "b"}), ("a: [", "a: ["), ("grpo", "grpo"), ("", None),
        ("2024-01-01", "2024-01-01"), ("my.module.f", "my.module.f"),
    ],
)  # fmt: skip
def test_parse_value(text, value):
    """Number, boolean, null, list, section, or text."""
    parsed = parse_value(text)
    assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-06", "0.000001"])
def test_yaml_exponent_is_a_number(tmp_path, text):
    """YAML 1.1 takes `1e-6` for text; here it is a number, also among a credit function's own options."""
    (tmp_path / "run.yaml").write_text(f"optim: {{learning_rate: {text}}}\ncredit: {{name: spro, beta: {text}}}\n")
    config = resolve(read_yaml(str(tmp_path / "run.yaml")))
    assert config.optim.learning_rate == 1e-6
    assert config.credit.options == {"beta": 1e-6}


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_empty_yaml(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    assert read_yaml(str(tmp_path / "run.yaml")) == {}


@pytest.mark.parametrize(
    "given",
    [
        {},
        *({"algorithm": name} for name in ALGORITHMS),
        {"model": "my-model", "reward": {"functions": "math, exact", "weights": [1, 0.5]}},
        {"optim": {"learning_rate": 1e-7, "betas": [0.9, 0.95]}, "sampler": {"stop_token_ids": "2,3"}},
        {"task": {"system_prompt": "Zwölf: # no comment\nline", "chat_template_kwargs": {"enable_thinking": False}}},
        {"task": {"system_prompt": "1e5"}, "run_dir": "1e-6", "model": "7e3"},
        {"credit": {"name": "my.module.credit", "rate": 1e-9, "mode": "on"}},
    ],
    ids=str,
)  # fmt: skip
def test_dump_and_read_back(tmp_path, given):
    """config.yaml of a run resolves to the config of the run."""
    config = resolve(given)
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert resolve(read_yaml(str(tmp_path / "config.yaml"))) == config


def written(tmp_path, content: str) -> Config:
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    return resolve(read_yaml(str(tmp_path / "run.yaml")))


@pytest.mark.parametrize(
    ("content", "option", "value"),
    [
        ("task: {system_prompt: None}", "task.system_prompt", None),
        ("task: {system_prompt: none}", "task.system_prompt", None),
        ('task: {system_prompt: "None"}', "task.system_prompt", "None"),
        ("task: {system_prompt: 12:30}", "task.system_prompt", "12:30"),
        ("task: {system_prompt: 1e-6}", "task.system_prompt", "1e-6"),
        ("task: {system_prompt: 0.90}", "task.system_prompt", "0.90"),
        ("task: {system_prompt: '~ ${HOME} $HOME'}", "task.system_prompt", "~ ${HOME} $HOME"),
        ('task: {system_prompt: ""}', "task.system_prompt", ""),
        ("task: {split: on}", "task.split", "on"),
        ("task: {columns: {question: 3, id: no}}", "task.columns", {"question": "3", "id": "no"}),
        ("model: 007", "model", "007"),
        ("run_dir: 2026-11-27", "run_dir", "2026-11-27"),
        ("reward: {workers: None}", "reward.workers", None),
        ("sampler: {stop_token_ids: None}", "sampler.stop_token_ids", None),
        ("prm: {update: none}", "prm.update", "none"),
        ("objective: {importance: none}", "objective.importance", "none"),
        ("train: {seed: 007}", "train.seed", 7),
        ("trust_remote_code: yes", "trust_remote_code", True),
        ("sampler: {server: {args: [--len, 4096, 0.90, no]}}", "sampler.server.args", ["--len", "4096", "0.90", "no"]),
        ("\ufefftrain: {seed: 3}", "train.seed", 3),
        ("train: {<<: {seed: 3, iterations: 5}, seed: 4}", "train.seed", 4),
    ],
)  # fmt: skip
def test_what_yaml_values_mean(tmp_path, content, option, value):
    """Text stays as it is written where the schema has text; None is null where that is allowed."""
    found = written(tmp_path, content).model_dump()
    for part in option.split("."):
        found = found[part]
    assert (type(found), found) == (type(value), value)


def test_none_is_said_to_be_null(tmp_path, caplog):
    written(tmp_path, "task: {eval_data: None}")
    assert "task.eval_data: 'None' is taken for null" in caplog.text


@pytest.mark.parametrize("section", ["credit", "loss", "reward.options.f", "sampler", "growth", "estimators.entropy"])
def test_numbers_that_no_schema_knows(tmp_path, section):
    """The same in YAML and on the command line; text in quotes stays text, also in the saved config."""
    name = {"credit": "spro", "loss": "mine.f"}.get(section.split(".")[0], "mine.f")
    named = "" if "options" in section else f", name: {name}"
    options = f'{{a: 1e-6, b: "1e-6", c: [1E5, .5], d: 2026-01-02, e: None, f: "None"{named}}}'
    section += ".options" if section in ("sampler", "growth") else ""
    content = options
    for part in reversed(section.split(".")):
        content = f"{{{part}: {content}}}"
    config = written(tmp_path, content)
    found = config.model_dump()
    for part in section.split("."):
        found = found[part]
    wanted = {"a": 1e-6, "b": "1e-6", "c": [1e5, 0.5], "d": "2026-01-02", "e": None, "f": "None"}
    assert {key: value for key, value in found.items() if key != "name"} == wanted
    assert resolve(read_yaml(str(dumped(tmp_path, config)))) == config
    assert parse_value("1e-6", [*section.split("."), "a"]) == 1e-6
    assert parse_value("None", [*section.split("."), "a"]) is None


def dumped(folder, config):
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return folder / "config.yaml"


PLACES = ["model", "task.data", "task.eval_data", "run_dir", "prm.model", "sampler.server.python"]
PLACES += ["critic.model", "sampler.server.folder", "sampler.name", "growth.name", "credit.name", "loss.name"]


@pytest.mark.parametrize("option", PLACES)
def test_home_and_environment_in_paths(tmp_path, monkeypatch, option):
    """In every option that is a path or a name, from YAML and the command line alike."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("EXP", "sets/a")
    for text, value in [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("d/${EXP}", "d/sets/a"),
        ("$HOME/x", "/home/me/x"),
        ("a~b$c", "a~b$c"),
    ]:
        content = f"'{text}'"
        for part in reversed(option.split(".")):
            content = f"{{{part}: {content}}}"
        (tmp_path / "run.yaml").write_text(content)
        for words in ([str(tmp_path / "run.yaml")], [f"--{option}", text]):
            found = parse(words, OWN, "train")[0]
            for part in option.split("."):
                found = found[part]
            assert found == value


def test_home_in_lists_of_names(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given, _ = parse(["--reward.functions", "~/a.py:f,verl:~/b.py:g,math", "--resume=~/runs/x"], OWN, "train")
    assert resolve(given).reward.functions == ["/home/me/a.py:f", "verl:/home/me/b.py:g", "math"]
    assert parse(["--resume=~/runs/x"], OWN, "train")[1] == {"resume": "/home/me/runs/x"}
    assert resolve({"estimators": {"x": "~/a.py:f"}}).estimators["x"].name == "/home/me/a.py:f"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--task.system-prompt", "None"], None),
        (["--task.system-prompt", "null"], None),
        (["--task.system-prompt", ""], ""),
        (["--task.system-prompt", "true"], "true"),
        (["--task.system-prompt", "[1, 2]"], "[1, 2]"),
    ],
)
def test_text_on_the_command_line(words, value):
    assert parse(words, OWN, "train")[0] == {"task": {"system_prompt": value}}


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "given, words",
    [
        ({"algorithm": "grop"}, ["algorithm", "'grop'", "did you mean 'grpo'", "spro"]),
        ({"trian": {"seed": 1}}, ["trian", "unknown option", "did you mean 'train'"]),
        ({"train": {"iteration": 1}}, ["train.iteration", "unknown option", "did you mean 'iterations'"]),
        ({"objective": {"kl": {"coeff": 1}}}, ["objective.kl.coeff", "unknown option", "did you mean 'coef'"]),
        (
            {"objective": {"aggregate": "tokenmean"}},
            ["objective.aggregate", "'tokenmean'", "did you mean 'token_mean'"],
        ),
        ({"objective": {"kl": {"estimator": "k4"}}}, ["objective.kl.estimator", "'k4'", "k1, k2, k3"]),
        ({"train": {"iterations": "many"}}, ["train.iterations", "integer", "'many'"]),
        ({"train": {"iterations": 0}}, ["train.iterations", "1", "0"]),
        ({"growth": {"group_size": -4}}, ["growth.group_size", "-4"]),
        ({"growth": {"group_size": 2.5}}, ["growth.group_size", "2.5"]),
        ({"optim": {"learning_rate": 0}}, ["optim.learning_rate", "greater than 0"]),
        ({"optim": {"learning_rate": "nan"}}, ["optim.learning_rate", "nan"]),
        ({"objective": {"entropy_coef": float("nan")}}, ["objective.entropy_coef", "nan"]),
        ({"objective": {"kl": {"coef": float("inf")}}}, ["objective.kl.coef", "inf"]),
        ({"sampler": {"top_p": 1.5}}, ["sampler.top_p", "1.5"]),
        ({"train": 5}, ["train", "section", "5"]),
        ({"credit": "spro"}, ["credit", "section", "'spro'"]),
        ({"task": {"columns": "question"}}, ["task.columns", "section"]),
        ({"train": {"seed": None}}, ["train.seed", "no value"]),
        ({"model": "${NO_SUCH}/x"}, ["model", "NO_SUCH is not set"]),
        ({"run_dir": "${NO:-x}"}, ["run_dir", "${NAME}"]),
        ({"task": {"data": "~nobody-here/x"}}, ["task.data", "~nobody-here", "home folder"]),
        ({"run_dir": ""}, ["run_dir", "empty"]),
    ],
)
def test_bad_option(given, words):
    """The message names the option with its section, what was given, and what would do."""
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"train: {seed: 1\n", ["run.yaml", "line 2", "not YAML"]),
        (b"- train\n", ["run.yaml", "list"]),
        (b"seed\n", ["run.yaml", "str"]),
        (b"run_dir: \xff\n", ["run.yaml"]),
        (b"train: {iterations: 1}\nmodel: x\ntrain: {seed: 3}\n", ["run.yaml, line 3", "train", "line 1"]),
        (b"train:\n  seed: 1\n  seed: 1\n", ["run.yaml, line 3", "train.seed", "line 2"]),
        (b"train: {seed: 1}\ntrain.seed: 2\n", ["run.yaml, line 1", "train.seed", "line 2"]),
        (b"credit: {beta: 1, beta: 2}\n", ["run.yaml, line 1", "credit.beta"]),
        (b"? [a]\n: 1\n", ["run.yaml, line 1", "name of an option"]),
        (b"a: &a {b: *a}\n", ["run.yaml", "itself"]),
        (b"model: !!python/name:os.system x\n", ["run.yaml, line 1", "not YAML"]),
        (b"a: 1\n---\nb: 2\n", ["run.yaml, line 2", "not YAML"]),
        (b"model: a\0b\n", ["run.yaml", "not YAML"]),
    ],
)
def test_bad_yaml(tmp_path, content, words):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(str(tmp_path / "run.yaml"))
    assert [word for word in words if word not in str(caught.value)] == []


# ---------------------------------------------------------------------- words to overrides


@pytest.mark.parametrize(("short", "path"), SHORT.items())
def test_short_flags_name_an_option(short, path):
    """Each short flag means the option of its path, in both spellings."""
    nested = parse([f"--{short}", "1"], OWN, "train")[0]
    assert nested == parse([f"--{path.replace('_', '-')}", "1"], OWN, "train")[0]
    value = resolve({"algorithm": "grpo"}).model_dump()
    for part in path.split("."):
        value, nested = value[part], nested[part]
    assert nested in (1, "1")


@pytest.mark.parametrize(
    "words, given",
    [
        (["--optim.learning-rate=1e-6"], {"optim": {"learning_rate": 1e-6}}),
        (["--optim.learning_rate", "1e-6"], {"optim": {"learning_rate": 1e-6}}),
        (["--objective.kl.coef", "-0.5"], {"objective": {"kl": {"coef": -0.5}}}),
        (["--group_size=-2"], {"growth": {"group_size": -2}}),
        (["--task.system-prompt=a=b --c"], {"task": {"system_prompt": "a=b --c"}}),
        (["--train.seed", "1", "--seed", "2"], {"train": {"seed": 2}}),
        (["--model", "007", "--run-dir", "1e5"], {"model": "007", "run_dir": "1e5"}),
        (["--optim.betas", "[0.9, 0.95]"], {"optim": {"betas": [0.9, 0.95]}}),
    ],
)
def test_parse(words, given):
    assert parse(words, OWN, "train") == (given, {"resume": "never"})


def test_own_options_stay_apart():
    assert parse(["--resume", "auto"], OWN, "train") == ({}, {"resume": "auto"})


@pytest.mark.parametrize("words", [["{}"], ["--config", "{}"], ["--config={}"]])
def test_config_file(tmp_path, words):
    """A YAML file is taken by position or after --config, never ignored."""
    (tmp_path / "run.yaml").write_text("train: {seed: 3}\n")
    words = [word.format(tmp_path / "run.yaml") for word in words]
    assert parse(words, OWN, "train")[0] == {"train": {"seed": 3}}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--iteration", "3"], "--iteration: unknown option; did you mean --iterations?"),
        (["--optm.learning-rate", "3"], "did you mean --optim.learning_rate?"),
        (["--zzz", "3"], "--zzz: unknown option; see 'stepcredit train --help'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--resume", "auto"], "--seed needs a value"),
        (["a.yaml", "b.yaml"], "unexpected 'b.yaml'"),
        (["gone.yaml"], "gone.yaml: no such config file"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(UserError) as caught:
        parse(words, OWN, "train")
    assert message in str(caught.value)


def test_a_file_beside_the_config_is_not_the_one_that_counts(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "d.jsonl").write_text("{}")
    (tmp_path / "run.yaml").write_text("task: {data: d.jsonl}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"task.data: 'd.jsonl' is beside this file, but paths count from the folder"):
        parse(["../run.yaml"], OWN, "train")
    (tmp_path / "here" / "d.jsonl").write_text("{}")
    assert parse(["../run.yaml"], OWN, "train")[0]["task"]["data"] == "d.jsonl"


def test_no_file_where_a_command_takes_none():
    with pytest.raises(UserError, match=r"credit: unexpected 'run\.yaml'"):
        parse(["run.yaml"], {"in": None}, "credit")


def test_dump_is_plain_yaml_with_every_section():
    assert yaml.safe_load(dump_yaml(resolve({}))).keys() == Config.model_fields.keys()


def test_a_section_with_nothing_under_it_is_empty():
    """`train:` alone in a YAML file changes nothing."""
    assert resolve({"train": None, "credit": None}) == resolve({})
