"""`stepcredit plan`: activations against what autograd keeps, published sizes, recipes that fit, advice that holds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_models import fresh
from torch import nn
from torch.distributed.tensor import DTensor

from stepcredit.cli.main import main
from stepcredit.config import read_yaml, resolve
from stepcredit.credit import needs_of
from stepcredit.credit.choose import build_credit
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.placement import Placement
from stepcredit.losses.choose import build_objective
from stepcredit.plan import memory
from stepcredit.plan.activations import saved_by_checkpoint, saved_by_layer, saved_outside
from stepcredit.plan.advice import fitting_budget, largest_budget, largest_rows, with_fitting_budget, with_options
from stepcredit.plan.memory import ALWAYS, GIB, PASS, SAMPLING, chosen_strategy, estimate_memory, fits_whole
from stepcredit.plan.sizes import size_of, size_of_network
from stepcredit.processes.ranks import Ranks
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "scale").glob("*.yaml"))
SMALL = {"hidden_size": 1536, "num_attention_heads": 12, "intermediate_size": 8960, "vocab_size": 151936}
LARGE = {"hidden_size": 3584, "num_attention_heads": 28, "intermediate_size": 18944, "vocab_size": 152064}
SHAPES = {
    "1.5b": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": LARGE | {"num_key_value_heads": 4, "tie_word_embeddings": False},
}
WIDTHS = [(64, 160, 4, 2, 16, 2), (128, 352, 8, 2, 16, 4), (192, 1024, 6, 6, 32, 2), (96, 480, 12, 1, 16, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders with nothing but the config.json of Qwen2.5 1.5B and 7B."""
    found = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 28}
        (folder / "config.json").write_text(json.dumps(config | shape))
        found[name] = str(folder)
    return found


def ran(*words: object) -> int:
    return main(["plan", *map(str, words)])


def bytes_of(plan: memory.Plan) -> dict[str, float]:
    return {part.name: part.bytes for part in plan.parts}


# ---------------------------------------------------------------------- activations


def shaped(family: str, width: tuple[int, ...]):
    hidden, intermediate, heads, kv_heads, head_dim, layers = width
    return fresh(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=layers,
    )


def groups() -> Forest:
    """4 groups of 6 completions."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    return Forest.from_trees(
        [Tree(Problem(id=str(number)), tokens(50), [Segment(tokens(70)) for _ in range(6)]) for number in range(4)]
    )


def kept(policy, forest: Forest) -> tuple[int, int]:
    """Bytes of what autograd keeps of a forward, and of casts of weights among it; each storage once."""
    whole = [value for value in policy.parameters() if not isinstance(value, DTensor)]  # shards are told by their shape
    weights = {value.untyped_storage().data_ptr() for value in whole}
    shapes = {tuple(value.shape) for value in policy.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not isinstance(tensor, nn.Parameter):
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = policy(forest)
    casts = sum(size for size, tensor in found.values() if tuple(tensor.shape) in shapes)
    total = sum(size for size, _ in found.values())
    scores.logprobs.sum().backward()
    return total - casts, casts


@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_activations_are_those_that_autograd_keeps(family, mixed, width) -> None:
    policy = shaped(family, width)
    policy.autocast = torch.bfloat16 if mixed else None
    forest = groups()
    found, casts = kept(policy, forest)
    size = size_of_network(policy.model)
    assert size.measured and size.layers == width[-1]
    expected = size.layers * saved_by_layer(size, mixed) + saved_outside(size, mixed)
    assert found / policy.num_positions(forest) == pytest.approx(expected, rel=0.03)
    # Norms are not cast, and the output layer's cast is not kept.
    assert casts == pytest.approx(2 * (size.weights - size.outside) if mixed else 0, rel=0.03)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_activations_of_checkpointed_layers(width, mixed) -> None:
    """Autograd keeps what goes into them, and nothing that is inside."""
    policy = shaped("qwen2", width)
    policy.autocast = torch.bfloat16 if mixed else None
    policy.checkpoint_layers()
    forest = groups()
    found, casts = kept(policy, forest)
    size = size_of_network(policy.model)
    angles = 8 * size.head_dim  # are held by the layers' calls, which nobody counts here
    expected = size.layers * saved_by_checkpoint(size, mixed) + saved_outside(size, mixed) - angles
    assert found / policy.num_positions(forest) == pytest.approx(expected, rel=0.03) and casts == 0


def test_a_plan_with_checkpointed_layers(folders) -> None:
    """Example: of 28 layers what goes into them, and two whole ones."""
    config = resolve({"model": folders["7b"], "train": {"gradient_checkpointing": True}})
    size = size_of(folders["7b"])
    for kind, sharded in (("ddp", False), ("fsdp", True)):
        found = estimate_memory(config, 8, kind, 80 * GIB)
        a_token = 28 * saved_by_checkpoint(size, True, sharded) + 2 * saved_by_layer(size, True, sharded)
        a_token += saved_outside(size, True, sharded)
        assert bytes_of(found)[f"activations of {found.tokens} tokens"] == found.tokens * a_token


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_activations_in_shards(family, again, mixed) -> None:
    """FSDP2 on one process: the residual stream is bf16 too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks()
        ranks._host = dist.group.WORLD
        policy = shaped(family, WIDTHS[1])
        policy.autocast = torch.bfloat16 if mixed else None
        size = size_of_network(policy.model)
        if again:
            policy.checkpoint_layers()
        forest = groups()
        found, _ = kept(Placement(ranks, "fsdp").place(policy), forest)
    finally:
        dist.destroy_process_group()
    by_layer, angles = (saved_by_checkpoint, 8 * size.head_dim) if again else (saved_by_layer, 0)
    expected = size.layers * by_layer(size, mixed, True) + saved_outside(size, mixed, True) - angles
    assert found / policy.num_positions(forest) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("reuse", [False, True])
def test_keys_and_values_are_those_that_the_sampler_holds(reuse) -> None:
    """3 rows behind each of 2 prompts; of trees the cached prefixes too."""
    policy = shaped("qwen2", WIDTHS[1])
    sampler = TransformersSampler(policy, 6, keep_mb=1, paged=True)
    params = SamplingParams(max_new_tokens=20)
    sampler.sample([list(range(3, 33))] * 2, 3, params, [0, 1], num_reusable=len if reuse else None)
    pool = sampler.machine.rows.pool
    size = size_of_network(policy.model)
    growth = {"name": "tree", "num_branches": 4} if reuse else {"group_size": 3}
    config = resolve(
        {
            "model": "none",
            "algorithm": "treerpo" if reuse else "grpo",
            "train": {"dtype": "float32", "problems_per_iteration": 2},
            "growth": growth,
            "task": {"max_prompt_tokens": 30},
            "sampler": {"max_new_tokens": 20, "max_rows": 6, "keep_mb": 1},
            "eval": {"num_problems": 0},
        }
    )
    setting = memory.Setting(config, 1, sharded=False, mixed=False)
    parts, rows = memory._sampling(setting, memory.Model(size, 0, size.weights))
    assert rows == 6 and parts[0].bytes == pool.data.nbytes + pool.fill.nbytes + pool.start.nbytes


# ---------------------------------------------------------------------- parts


def test_sizes_are_the_published_ones(folders) -> None:
    small, large = size_of(folders["1.5b"]), size_of(folders["7b"])
    assert (small.weights, large.weights) == (1_543_714_304, 7_615_616_512)
    assert large.outside == 2 * 152064 * 3584 + 3584 and small.outside == 151936 * 1536 + 1536
    assert large.weights == 28 * large.largest_layer + large.outside


def test_parts_of_prime(folders) -> None:
    """A policy, a reference and a reward model: whole, in shards, offloaded, with the policy as reference, adapters."""
    size = size_of(folders["7b"])
    config = resolve({"algorithm": "prime", "model": folders["7b"]})
    whole, sharded = (bytes_of(estimate_memory(config, 8, name, 80 * GIB)) for name in ("ddp", "fsdp"))
    for name, width in [("policy: weights", 4), ("policy: AdamW", 8), ("reference: weights", 4)]:
        assert whole[f"{name}, fp32"] == width * size.weights
        assert sharded[f"{name}, fp32"] == width * size.weights / 8
    assert whole["reward model: AdamW, fp32"] == 8 * size.weights
    assert whole["gradients, fp32"] == 4 * size.weights and not any("DDP" in name for name in whole)
    assert sharded["sampler: a whole copy of the policy, bf16"] == 2 * size.weights
    assert not any("sampler: a whole copy" in name for name in whole) and not any("DDP" in name for name in sharded)
    offloaded = with_options(config, {"distributed.cpu_offload": True})
    found = estimate_memory(offloaded, 8, "fsdp", 80 * GIB)
    assert found.taken(ALWAYS) == 2 * size.weights
    own = with_options(config, {"prm.reference": "policy"})
    assert "reference: weights, fp32" not in bytes_of(estimate_memory(own, 8, "ddp", 80 * GIB))
    frozen = with_options(config, {"prm.update": "none"})
    assert "reward model: AdamW, fp32" not in bytes_of(estimate_memory(frozen, 8, "ddp", 80 * GIB))
    adapters = 16 * sum(size.linear.values())
    lora = bytes_of(estimate_memory(with_options(config, {"lora.rank": 16}), 8, "ddp", 80 * GIB))
    assert lora["policy: AdamW, fp32"] == 8 * adapters and "reference: weights, fp32" not in lora
    assert lora["reward model: weights, fp32"] == 4 * adapters  # its base is the policy's
    assert lora["policy: frozen weights, bf16"] == 2 * size.weights and lora["policy: weights, fp32"] == 4 * adapters
    assert lora["bf16 casts of weights"] == 2 * adapters
    fp32 = with_options(config, {"lora.rank": 16, "train.dtype": "float32"})
    assert bytes_of(estimate_memory(fp32, 8, "ddp", 80 * GIB))["policy: weights, fp32"] == 4 * (size.weights + adapters)


def test_a_sampler_elsewhere_takes_nothing_here(folders, capsys) -> None:
    """Neither a copy of a sharded policy, nor keys and values; all else stays."""
    given = {"model": folders["7b"], "algorithm": "treerpo"}
    for strategy in ("ddp", "fsdp"):
        here = estimate_memory(resolve(given), 8, strategy, 80 * GIB)
        there = estimate_memory(resolve(given | {"sampler": {"name": "vllm"}}), 8, strategy, 80 * GIB)
        left = [part for part in here.parts if part.when != SAMPLING and not part.name.startswith("sampler: ")]
        assert list(there.parts) == left and there.rows == 0 < here.rows
    copy = 2 * memory.size_of(folders["7b"]).weights
    assert bytes_of(here)["sampler: a whole copy of the policy, bf16"] == copy
    assert ran("--gpus", 8, "--model", folders["7b"], "--sampler.name", "vllm") in (0, 1)
    assert "not counted: the sampler" in capsys.readouterr().out
    assert ran("--gpus", 8, "--model", folders["7b"]) in (0, 1)
    assert "not counted" not in capsys.readouterr().out


def test_only_what_an_algorithm_needs(folders) -> None:
    plain = bytes_of(estimate_memory(resolve({"algorithm": "opo", "model": folders["1.5b"]}), 8, "ddp", 80 * GIB))
    assert not any(name.startswith(("reference", "reward model")) for name in plain)
    trees = bytes_of(estimate_memory(resolve({"algorithm": "treerpo", "model": folders["1.5b"]}), 8, "ddp", 80 * GIB))
    assert "reference: weights, fp32" in trees
    kept = next(size for name, size in trees.items() if name.startswith("pages of keys and values"))
    none = {"algorithm": "treerpo", "model": folders["1.5b"], "sampler": {"keep_mb": 0}}
    bare = bytes_of(estimate_memory(resolve(none), 8, "ddp", 80 * GIB))
    without = next(size for name, size in bare.items() if name.startswith("pages of keys and values"))
    assert kept - without == pytest.approx(4096 * 2**20, rel=0.002)
    alone = bytes_of(estimate_memory(resolve({"algorithm": "opo", "model": folders["1.5b"]}), 1, "ddp", 80 * GIB))
    assert not any("DDP" in name for name in alone)


def test_a_path_is_never_split(folders) -> None:
    """A budget under the longest path, and one over all that a process has in a step, are not what is computed."""
    config = resolve({"model": folders["1.5b"], "train": {"problems_per_iteration": 8}})
    few, many = (with_options(config, {"optim.max_tokens_per_micro_batch": budget}) for budget in (10, 10**8))
    assert estimate_memory(few, 8, "ddp", GIB).tokens == 1024 + 1024
    assert estimate_memory(many, 8, "ddp", GIB).tokens == 1024 + 8 * 1024


def test_the_largest_that_fits(folders) -> None:
    """One token or row more does not."""
    config = resolve({"model": folders["1.5b"], "growth": {"group_size": 2048}, "sampler": {"max_rows": 4096}})
    plan = estimate_memory(config, 8, "ddp", 80 * GIB)
    for option, largest, when in (
        ("optim.max_tokens_per_micro_batch", largest_budget(config, plan), PASS),
        ("sampler.max_rows", largest_rows(config, plan), SAMPLING),
    ):
        at, over = (
            estimate_memory(with_options(config, {option: largest + more}), 8, "ddp", 80 * GIB) for more in (0, 1)
        )
        assert largest > 1 and at.taken(when) <= plan.usable < over.taken(when)
    assert largest_budget(config, estimate_memory(config, 8, "ddp", 20 * GIB)) == 0


def test_the_budget_at_the_start_of_a_run_is_one_that_fits(folders) -> None:
    """Example: 16,384 tokens of 1.5B do not fit on a GPU of 80 GiB."""
    config = resolve({"model": folders["1.5b"], "growth": {"group_size": 64}})
    assert config.optim.max_tokens_per_micro_batch == 16384
    for strategy, gpus in (("ddp", 1), ("ddp", 8), ("fsdp", 8)):
        found = fitting_budget(config, gpus, 80 * GIB, strategy)
        plan = estimate_memory(config, gpus, strategy, 80 * GIB)
        fits = plan.taken(PASS) <= plan.usable
        assert found == (16384 if fits else largest_budget(config, plan) // 256 * 256)
        assert (found < 16384) == (strategy == "ddp")
        lowered = estimate_memory(
            with_options(config, {"optim.max_tokens_per_micro_batch": found}), gpus, strategy, 80 * GIB
        )
        assert lowered.taken(PASS) <= lowered.usable
    assert fitting_budget(config, 1, 20 * GIB, "ddp") == 1024 + 1024  # nothing fits: the longest path
    assert fitting_budget(config, 1, 1000 * GIB, "ddp") == 16384
    few = with_options(config, {"optim.max_tokens_per_micro_batch": 100})
    assert fitting_budget(few, 1, 20 * GIB, "ddp") == 100  # what is asked for is never raised


def test_the_budget_is_lowered_on_gpus_alone_and_said(folders, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    config = resolve({"model": folders["1.5b"], "growth": {"group_size": 64}})
    assert with_fitting_budget(config, torch.device("cpu"), 1, "ddp") is config and not caplog.text
    found = with_fitting_budget(config, torch.device("cuda"), 1, "ddp").optim.max_tokens_per_micro_batch
    assert found == fitting_budget(config, 1, 80 * GIB, "ddp")
    assert f"at most {found} tokens, not 16384 (optim.max_tokens_per_micro_batch)" in caplog.text
    assert "80 GiB" in caplog.text and len(caplog.records) == 1
    small = with_options(config, {"optim.max_tokens_per_micro_batch": found})
    assert with_fitting_budget(small, torch.device("cuda"), 1, "ddp") is small and len(caplog.records) == 1


def test_a_gpu_holds_larger_chunks_of_logits(folders) -> None:
    """Two buffers of 1 GiB, or of all logits of a micro-batch where these are fewer."""
    size = size_of(folders["7b"])
    config = resolve({"model": folders["7b"]})
    few = {"task.max_prompt_tokens": 50, "sampler.max_new_tokens": 50, "growth.group_size": 1024}
    config = with_options(config, few)
    gradient = size.vocabulary * size.hidden * 6
    for budget, logits in ((8192, 1 << 28), (100, 100 * size.vocabulary)):
        changed = with_options(config, {"optim.max_tokens_per_micro_batch": budget})
        found = bytes_of(estimate_memory(changed, 8, "fsdp", 80 * GIB))
        assert found["output layer: chunks of logits, its gradient"] == 2 * 4 * logits + gradient


def test_auto_is_what_training_takes(folders, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    for name, budget, expected in (("1.5b", 8192, "ddp"), ("1.5b", 16384, "fsdp"), ("7b", 2048, "fsdp")):
        config = resolve({"model": folders[name], "optim": {"max_tokens_per_micro_batch": budget}})
        config = with_options(config, {"growth.group_size": 64})
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_world_size", lambda: 8)
            whole = fits_whole(config, torch.device("cuda"))
        assert chosen_strategy(config, 8, 80 * GIB) == expected == ("ddp" if whole else "fsdp")
        assert fits_whole(config, torch.device("cpu"))


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_on_8_gpus(path, folders, capsys) -> None:
    """They resolve to their algorithm, their parts go together, and they say where their numbers come from."""
    algorithm, size = path.stem.split("_")
    config = resolve(read_yaml(str(path)))
    assert config.algorithm == algorithm and size in config.model.lower()
    credit, _ = build_credit(config.credit)
    flat = needs_of(credit).forests == "flat"
    config.growth.check(flat, config.credit.name, "", len(config.objective.depth_weights))
    build_objective(config, flat)
    head = path.read_text().split("\nalgorithm")[0]
    assert "arXiv" in head and "ours" in head.lower() and f"train recipes/scale/{path.name}" in head
    assert ran(path, "--model", folders[size], "--gpus", 8) == 0, capsys.readouterr().out


def test_there_are_recipes_of_both_sizes() -> None:
    names = {f"{name}_{size}" for name in ("spro", "treerpo", "prime", "opo") for size in SHAPES}
    assert {path.stem for path in RECIPES} == names


def test_prime_needs_no_checkpointing_on_16_gpus(folders) -> None:
    """What its comment says."""
    words = [ROOT / "recipes" / "scale" / "prime_7b.yaml", "--model", folders["7b"]]
    words += ["--train.gradient-checkpointing", "false", "--optim.max-tokens-per-micro-batch", 5120]
    assert ran(*words, "--gpus", 8) == 1
    assert ran(*words, "--gpus", 16) == 0


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words",
    [
        "--algorithm grpo --gpus 8 --distributed.strategy ddp",
        "--algorithm prime --gpus 8",
        "--algorithm spro --gpus 2 --gpu-memory-gib 40",
        "--gpus 1",
        "--algorithm opo --gpus 8 --max-new-tokens 3072 --group-size 512 --sampler.max-rows 999",
    ],
)
def test_advice_fits(words, folders, tmp_path, capsys) -> None:
    """Every line that is offered, added to what was asked, gives exit code 0."""
    words = ["--model", folders["7b"], *words.split()]
    assert ran(*words, "--json", tmp_path / "plan.json") == 1
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert not numbers["fits"] and numbers["advice"]
    shown = capsys.readouterr().out
    for row in numbers["advice"]:
        assert row["options"] in shown and row["peak"] <= numbers["usable"]
        assert ran(*words, *row["options"].split()) == 0


def test_shown_and_written(folders, tmp_path, capsys) -> None:
    assert ran("--model", folders["1.5b"], "--gpus", 8, "--algorithm", "spro", "--json", tmp_path / "plan.json") == 0
    shown = capsys.readouterr().out
    assert (
        "auto takes" in shown and "it fits" in shown and "1.54 B" in shown and max(map(len, shown.split("\n"))) <= 120
    )
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["fits"] and numbers["measured"] and set(numbers["strategies"]) == {"ddp", "fsdp"}
    for found in numbers["strategies"].values():
        taken = sum(part["bytes"] for part in found["parts"] if part["when"] in (ALWAYS, found["tightest"]))
        assert found["peak"] == pytest.approx(taken) and found["largest_micro_batch_tokens"] >= 2048


def test_nothing_helps(folders, capsys) -> None:
    assert ran("--model", folders["7b"], "--gpus", 1, "--gpu-memory-gib", 8) == 1
    assert "smaller model" in capsys.readouterr().out


def test_other_models_are_estimates(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    assert ran("--model", tmp_path, "--gpus", 1) == 0
    assert "estimate" in capsys.readouterr().out


def test_the_embedded_model_is_enough(capsys) -> None:
    assert ran("--gpus", 2) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--gpus N is missing"),
        ("--gpus 0", "above 0"),
        ("--gpus 1.5", "whole number"),
        ("--gpus many", "not a number"),
        ("--gpus 8 --gpu-memory-gib nan", "above 0"),
        ("--gpus 8 --distributed.cpu-offload true", "--distributed.strategy fsdp"),
        ("--gpus 8 --model .", "config.json"),
        ("--gpus 8 --model nowhere", "no folder"),
        ("--gpus 8 --algorithm grop", "grpo"),
        ("--gpus 8 --gpu-memory 80", "--gpu-memory-gib"),
    ],
)
def test_bad_input(words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert ran(*words.split()) == 2
    assert said in capsys.readouterr().err
