"""`stepcredit config`: what of TRL's and verl's configs becomes of ours, and that nothing is dropped in silence."""

import json
import re
from pathlib import Path

import pytest
import yaml

from stepcredit.cli import conversion as conversion_module
from stepcredit.cli import from_trl, from_verl
from stepcredit.cli.conversion import Conversion, path_of
from stepcredit.cli.main import COMMANDS, HELP, main
from stepcredit.cli.others import OPTIONS
from stepcredit.config import resolve
from stepcredit.credit.choose import build_credit
from stepcredit.losses.choose import build_objective

TRL = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "problems.jsonl",
    "max_steps": 100,
    "reward_funcs": "my_rewards.right",
}
VERL = {
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-0.5B",
    "data.train_files": "train.parquet",
    "trainer.total_training_steps": 100,
    "custom_reward_function.path": "score.py",
    "algorithm.adv_estimator": "grpo",
}


def convert(capsys, library, tmp_path, *words, **options):
    """The config that is printed, as a nested dictionary, its text, and what is told on standard error."""
    file = tmp_path / "theirs.yaml"
    options = (TRL if library == "trl" else VERL) | options
    file.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    return run(capsys, library, str(file), *words)


def run(capsys, library, *words):
    capsys.readouterr()
    code = main(["config", "--from", library, *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return yaml.safe_load(out) and resolve_text(out), out, err


def resolve_text(text):
    """As `stepcredit train` reads it."""
    from stepcredit.config.values import parse_yaml

    given = parse_yaml(text)
    config = resolve(given)
    build_credit(config.credit)
    build_objective(config, True)
    return given


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["config", *words]) == 2
    return capsys.readouterr().err


def section(text, title):
    """The remarks of a part of the comments."""
    part = re.search(rf"# Options {title}: (\d+)\n((?:#   .*\n)*)", text)
    lines = part.group(2).splitlines()
    assert len(lines) == int(part.group(1))
    return [line.removeprefix("#   ") for line in lines]


# ---------------------------------------------------------------------- TRL


def test_the_defaults_of_trl_are_written_where_they_are_not_ours(capsys, tmp_path):
    given, text, _ = convert(capsys, "trl", tmp_path)
    assert given["algorithm"] == "grpo" and given["model"] == "Qwen/Qwen2.5-0.5B"
    config = resolve(given)
    assert config.objective.aggregate == "token_mean"  # loss_type dapo
    assert config.sampler.max_new_tokens == 512 and config.optim.schedule == "linear"
    assert config.train.gradient_checkpointing and config.growth.group_size == 8
    assert config.train.problems_per_iteration == 1 and config.train.iterations == 100 == given["train"]["iterations"]
    assert config.checkpoint.every == 500 and config.optim.learning_rate == 1e-6 and config.objective.kl.coef == 0
    assert config.loss.options == {"clip_low": 0.2, "clip_high": 0.2}
    assert "group_size" not in given.get("growth", {}) and "temperature" not in given.get("sampler", {})
    assert config.reward.functions == ["my_rewards.right"]
    assert section(text, "without a counterpart, left out") == [] == section(text, "for you to give")


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"beta": 0.04}, {"objective.kl.coef": 0.04, "objective.kl.estimator": "k3"}),
        ({"epsilon": 0.1}, {"loss.clip_low": 0.1, "loss.clip_high": 0.1}),
        ({"epsilon_high": 0.28}, {"loss.clip_low": 0.2, "loss.clip_high": 0.28}),
        ({"delta": 3.0}, {"loss.dual_clip": 3.0}),
        ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"algorithm": "dr_grpo"}),
        ({"loss_type": "dapo", "scale_rewards": False}, {"algorithm": "grpo", "credit.name": "dr_grpo"}),
        ({"scale_rewards": "batch"}, {"credit.name": "reinforce_pp_baseline"}),
        ({"loss_type": "grpo"}, {"objective.aggregate": "seq_mean_token_mean"}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"loss.name": "cispo", "loss.clip_high": 4.0}),
        (
            {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4},
            {"loss.name": "gspo", "loss.clip_low": 3e-4, "loss.clip_high": 4e-4},
        ),
        (
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
            {"train.problems_per_iteration": 8, "optim.num_minibatches": 1, "train.iterations": 100},
        ),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 8},
            {"train.problems_per_iteration": 8, "optim.num_minibatches": 4, "train.iterations": 25},
        ),
        (
            {"generation_batch_size": 64, "num_iterations": 2},
            {
                "train.problems_per_iteration": 8,
                "optim.num_minibatches": 8,
                "optim.num_epochs": 2,
                "train.iterations": 6,
            },
        ),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 1},
            {"train.problems_per_iteration": 4, "optim.num_minibatches": 1, "train.iterations": 100},
        ),
        ({"warmup_steps": 10, "steps_per_generation": 2}, {"optim.warmup": 5}),
        ({"warmup_ratio": 0.1}, {"optim.warmup": 10}),
        ({"use_peft": True}, {"lora.rank": 16, "lora.alpha": 32}),
        ({"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"]}, {"lora.targets": ["q_proj"]}),
        ({"mask_truncated_completions": True}, {"shapers": ["mask_truncated"]}),
        ({"report_to": "wandb"}, {"track.sinks": ["wandb"]}),
        ({"use_vllm": True}, {"sampler.name": "vllm", "objective.importance": "sequence"}),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, {"objective.importance": "none"}),
        ({"reward_funcs": ["accuracy_reward"]}, {"reward.functions": ["trl.rewards.accuracy_reward"]}),
        ({"save_strategy": "no"}, {"checkpoint.every": 0}),
        ({"eval_strategy": "steps", "eval_steps": 20}, {"eval.every": 20}),
        ({"use_adaptive_entropy": True}, {"objective.entropy_target": 0.2}),
        ({"bf16": True}, {"train.dtype": "bfloat16"}),
        ({"top_k": 20, "top_p": 0.9, "temperature": 0.7}, {"sampler.top_k": 20, "sampler.temperature": 0.7}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_an_option_of_trl_becomes(capsys, tmp_path, options, wanted):
    given, text, _ = convert(capsys, "trl", tmp_path, **options)
    check(given, wanted)
    assert "beta" not in resolve(given).credit.options
    left_out = [line.partition(":")[0] for line in section(text, "without a counterpart, left out")]
    assert not set(left_out) & set(options) - {"epsilon"}


def check(given, wanted):
    config = resolve(given).model_dump(mode="json")
    for path, value in wanted.items():
        part = config
        for name in path.split("."):
            part = part[name]
        assert part == value, path


def test_all_that_is_left_out_is_named_and_counted(capsys, tmp_path):
    options = {"logging_steps": 5, "repetition_penalty": 1.1, "lora_r": 8, "vllm_mode": "server", "beta": 0.1}
    options |= {"env": {"A": "1"}, "loss_type": "sapo", "fp16": True}
    _, text, err = convert(capsys, "trl", tmp_path, **options)
    lines = section(text, "without a counterpart, left out")
    named = {line.partition(":")[0]: line for line in lines}
    assert set(named) == set(options) - {"beta"}
    assert named["logging_steps"] == "logging_steps: 5; every iteration is logged"
    assert named["repetition_penalty"] == "repetition_penalty: 1.1; no counterpart"
    assert named["lora_r"].endswith("use_peft is off") and named["vllm_mode"].endswith("use_vllm is off")
    assert "7 have no counterpart" in err
    assert any(line.startswith("beta: TRL multiplies the KL term") for line in section(text, "whose meaning differs"))


def test_what_the_file_does_not_say_is_asked_for(capsys, tmp_path):
    _, text, err = convert(
        capsys, "trl", tmp_path, model_name_or_path=None, dataset_name=None, max_steps=None, reward_funcs=None, seed=1
    )
    asked = [line.partition(":")[0] for line in section(text, "for you to give")]
    assert asked == ["--data", "--model", "--iterations", "--reward.functions"] and "4 are for you to give" in err
    given, text, _ = convert(
        capsys, "trl", tmp_path, "--model", "Qwen/Qwen2.5-0.5B", "--data", "a.jsonl", "--iterations", "7",
        "--reward.functions", "math", model_name_or_path=None, dataset_name=None, max_steps=None, reward_funcs=None,
        seed=1,
    )  # fmt: skip
    assert section(text, "for you to give") == [] and given["task"]["data"] == "a.jsonl"
    assert given["train"]["iterations"] == 7 and resolve(given).reward.functions == ["math"]


def test_without_a_model_every_default_is_written(capsys, tmp_path):
    """The recipe of the embedded model would take the place of what is not written."""
    given, _, _ = convert(capsys, "trl", tmp_path, model_name_or_path=None)
    assert given["optim"]["learning_rate"] == 1e-6 and given["growth"]["group_size"] == 8
    config = resolve(given)
    assert config.model == "embedded" and config.optim.learning_rate == 1e-6 and config.sampler.max_new_tokens == 512


def test_processes_multiply_the_batch_of_trl(capsys, tmp_path):
    given, text, _ = convert(capsys, "trl", tmp_path, "--processes", "8")
    assert resolve(given).train.problems_per_iteration == 8
    assert any(
        "64 completions of 8 processes are an iteration" in line for line in section(text, "whose meaning differs")
    )


WRONG = {
    "group": ({"num_generations": 3}, "no multiple of 3; with several processes give --processes"),
    "both": ({"generation_batch_size": 8, "steps_per_generation": 1}, "TRL takes one of the two"),
    "rows": ({"generation_batch_size": 12}, "is no multiple of the 8 rows"),
    "word": ({"epsilon": "much"}, "TRL's epsilon: 'much' is not a number"),
    "scale": ({"scale_rewards": "all"}, "none of group, batch, none"),
    "ours": ({"temperature": -1.0}, "sampler.temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_do_not_fit(capsys, tmp_path, case):
    options, message = WRONG[case]
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump(TRL | options))
    assert message in refused(capsys, "--from", "trl", str(file))


def test_json_and_an_output_file(capsys, tmp_path):
    file, out = tmp_path / "theirs.json", tmp_path / "ours.yaml"
    file.write_text(json.dumps(TRL | {"learning_rate": 2e-6}))
    assert main(["config", "--from", "trl", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert resolve(resolve_text(out.read_text())).optim.learning_rate == 2e-6


# ---------------------------------------------------------------------- verl


def test_the_defaults_of_verl_are_written_where_they_are_not_ours(capsys, tmp_path):
    given, text, _ = convert(capsys, "verl", tmp_path)
    config = resolve(given)
    assert config.growth.group_size == 1 and config.train.problems_per_iteration == 1024
    assert config.optim.num_minibatches == 4 and config.optim.weight_decay == 0.01
    assert config.objective.aggregate == "token_mean" and config.loss.options["dual_clip"] == 3.0
    assert config.sampler.max_new_tokens == 512 and config.task.max_prompt_tokens == 512
    assert config.task.long_prompts == "raise" and config.train.gradient_checkpointing
    assert config.checkpoint.every == 0 and config.objective.kl.coef == 0 and config.optim.schedule == "constant"
    assert config.reward.functions == ["verl:./score.py:compute_score"] and config.train.iterations == 100
    assert section(text, "without a counterpart, left out") == [] == section(text, "for you to give")


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"algorithm.adv_estimator": "rloo"}, {"algorithm": "rloo"}),
        ({"algorithm.adv_estimator": "opo"}, {"algorithm": "opo", "loss.name": "clip"}),
        ({"algorithm.adv_estimator": "reinforce_plus_plus"}, {"algorithm": "reinforce_pp"}),
        (
            {"algorithm.adv_estimator": "gae", "algorithm.lam": 0.95, "critic.optim.lr": 2e-5},
            {"algorithm": "ppo", "credit.lam": 0.95, "critic.learning_rate": 2e-5, "critic.clip": 0.5},
        ),
        ({"algorithm.norm_adv_by_std_in_grpo": False}, {"algorithm": "dr_grpo"}),
        (
            {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.01},
            {"objective.kl.coef": 0.01, "objective.kl.estimator": "k3"},
        ),
        ({f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_type": "mse"}, {"objective.kl.estimator": "k2"}),
        ({"algorithm.use_kl_in_reward": True}, {"objective.kl.coef": 0.001, "objective.kl.estimator": "k1"}),
        ({f"{ACTOR}.clip_ratio_high": 0.28}, {"loss.clip_low": 0.2, "loss.clip_high": 0.28}),
        ({f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, {"objective.aggregate": "seq_mean_token_mean"}),
        (
            {
                f"{ACTOR}.policy_loss.loss_mode": "gspo",
                f"{ACTOR}.clip_ratio_low": 3e-4,
                f"{ACTOR}.clip_ratio_high": 4e-4,
            },
            {"loss.name": "gspo", "loss.clip_low": 3e-4, "objective.aggregate": "seq_mean_token_mean"},
        ),
        ({"data.train_batch_size": 64, f"{ACTOR}.ppo_mini_batch_size": 64}, {"optim.num_minibatches": 1}),
        ({f"{ROLLOUT}.n": 8, f"{ROLLOUT}.name": "vllm"}, {"growth.group_size": 8, "sampler.name": "vllm"}),
        ({"algorithm.filter_groups.enable": True}, {"filter.enabled": True, "filter.keep": "varied"}),
        ({"data.filter_overlong_prompts": True}, {"task.long_prompts": "drop"}),
        ({"trainer.logger": ["console", "wandb"]}, {"track.sinks": ["wandb"]}),
        ({"actor_rollout_ref.model.lora_rank": 8}, {"lora.rank": 8, "lora.alpha": 16}),
        ({f"{ACTOR}.optim.lr_warmup_steps_ratio": 0.05}, {"optim.warmup": 5}),
        ({"trainer.save_freq": 20, "trainer.test_freq": 5}, {"checkpoint.every": 20, "eval.every": 5}),
        ({"data.prompt_key": "question"}, {"task.columns": {"question": "question"}}),
        ({"data.train_files": ["a.parquet", "b.parquet"]}, {"task.data": "a.parquet,b.parquet"}),
        (
            {"reward_model.overlong_buffer.enable": True, "reward_model.overlong_buffer.len": 128},
            {"shapers": [{"name": "overlong", "buffer": 128, "coef": 1.0}]},
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_an_option_of_verl_becomes(capsys, tmp_path, options, wanted):
    given, text, _ = convert(capsys, "verl", tmp_path, **options)
    check(given, wanted)
    left_out = [line.partition(":")[0] for line in section(text, "without a counterpart, left out")]
    assert not set(left_out) & set(options)


def test_a_bound_that_verl_does_not_read_is_told(capsys, tmp_path):
    given, text, _ = convert(capsys, "verl", tmp_path, **{f"{ACTOR}.clip_ratio": 0.1})
    check(given, {"loss.clip_low": 0.2, "loss.clip_high": 0.2})
    assert any(f"{ACTOR}.clip_ratio: without effect in verl" in line for line in section(text, "whose meaning differs"))


SCRIPT = """\
#!/bin/bash
set -x
export STEPS=12
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/train.parquet \\
    data.train_batch_size=128 \\
    +actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B \\
    actor_rollout_ref.actor.optim.lr=5e-7 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
    trainer.logger='["console","tensorboard"]' \\
    ~trainer.project_name=x \\
    trainer.total_training_steps=10 $@  # the rest
"""


def test_the_script_that_starts_a_run(capsys, tmp_path):
    file = tmp_path / "run.sh"
    file.write_text(SCRIPT)
    given, text, _ = run(capsys, "verl", str(file), "actor_rollout_ref.rollout.n=4", "data.train_batch_size=256")
    check(given, {"growth.group_size": 4, "train.problems_per_iteration": 256, "optim.num_minibatches": 4})
    check(given, {"optim.learning_rate": 5e-7, "track.sinks": ["tensorboard"], "train.iterations": 10})
    lines = section(text, "without a counterpart, left out")
    assert any(
        line == "data.train_files: $HOME/train.parquet; a variable of the shell: give its value" for line in lines
    )
    assert any(line.startswith("~trainer.project_name=x: only Hydra") for line in lines)
    assert (
        any("tensor_model_parallel_size: 2; an option of verl's engine" in line for line in lines) and len(lines) == 3
    )
    assert [line.partition(":")[0] for line in section(text, "for you to give")] == ["--data", "--reward.functions"]


def test_a_nested_file_with_references(capsys, tmp_path):
    file = tmp_path / "verl.yaml"
    file.write_text(
        "algorithm: {adv_estimator: grpo}\n"
        "data: {train_files: a.parquet, max_response_length: 256}\n"
        "actor_rollout_ref:\n"
        "  model: {path: Qwen/Qwen2.5-0.5B}\n"
        "  rollout: {n: 4, response_length: '${data.max_response_length}'}\n"
        "  actor: {entropy_coeff: '${oc.select:algorithm.gone,0.1}', ppo_epochs: 2}\n"
    )
    given, text, _ = run(capsys, "verl", str(file))
    check(given, {"sampler.max_new_tokens": 256, "growth.group_size": 4, "optim.num_epochs": 2})
    lines = section(text, "without a counterpart, left out")
    assert any(line.startswith("actor_rollout_ref.rollout.response_length: 256;") for line in lines)
    assert any("its value is not in this file" in line for line in lines) and len(lines) == 2


# ---------------------------------------------------------------------- both


WORDS = {
    "reward_funcs": "a.b",
    "report_to": "wandb",
    "logger": "wandb",
    "path": "a",
    "train_files": "a",
    "name": "vllm",
}


@pytest.mark.parametrize("library", ["TRL", "verl"])
def test_every_name_of_the_table_is_read(library):
    """Each has an effect or a line of its own, alone and beside what it needs."""
    module = from_trl if library == "TRL" else from_verl
    base = dict(TRL if library == "TRL" else VERL)
    for option in OPTIONS:
        for name in option.trl if library == "TRL" else option.verl:
            if name in ("resume_from_checkpoint", "trainer.resume_mode", "scale_rewards", "algorithm.adv_estimator"):
                continue
            value = WORDS.get(name.rpartition(".")[2], module.DEFAULTS.get(name, 8))
            read = Conversion(library, base | {name: value}, module.DEFAULTS)
            from_trl.from_trl(read, 1) if library == "TRL" else from_verl.from_verl(read)
            unexplained = [
                each for each in read.left_out if each.about == name and each.text.endswith("no counterpart")
            ]
            assert not unexplained and not read.unread, name
            if option.convert is not None and name not in ("delta", "actor_rollout_ref.actor.clip_ratio_c"):
                assert path_of(option.here) in read.ours and path_of(option.here) not in read.implied, name


MISTAKES = [
    ([], "trl or verl"),
    (["--from", "tlr", "x"], "did you mean 'trl'"),
    (["--from", "trl"], "name the file to convert"),
    (["--from", "trl", "gone.yaml"], "there is no file 'gone.yaml'"),
    (["--from", "trl", "a.b=1"], "overrides NAME=VALUE are verl's"),
    (["--from", "verl", "a", "b"], "one file is converted"),
    (["--from", "verl", "algorithm.adv_estimator=magic"], "'magic' has no counterpart"),
    (["--from", "trl", "x", "--beta", "1"], "KL coefficient in TRL"),
]


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes_are_told(capsys, words, message):
    assert message in refused(capsys, *(words or ["--processes", "1"]))


def test_files_that_cannot_be_read(capsys, tmp_path):
    for name, text, message in (
        ("twice.yaml", "beta: 1\nbeta: 2\n", "line 2: options.beta stands there already, in line 1"),
        ("list.yaml", "- 1\n", "expected options such as"),
        ("broken.yaml", "a: [1\n", "not YAML"),
        ("broken.json", "{", "line 1: not JSON"),
    ):
        (tmp_path / name).write_text(text)
        assert message in refused(capsys, "--from", "trl", str(tmp_path / name))
    (tmp_path / "empty.sh").write_text("echo hello\n")
    assert "there is no override" in refused(capsys, "--from", "verl", str(tmp_path / "empty.sh"))


def test_help_has_examples(capsys):
    assert main(["config", "--help"]) == 0
    assert "stepcredit config --from verl run_grpo.sh" in capsys.readouterr().out
    assert "config" in COMMANDS and "stepcredit config " in HELP


def test_the_page_tells_of_it():
    page = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
    assert "stepcredit config --from trl" in page and "stepcredit config --from verl" in page


def test_the_example_holds():
    import doctest

    assert doctest.testmod(conversion_module).failed == 0
