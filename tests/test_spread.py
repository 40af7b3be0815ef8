"""Two processes, of which one reads the weights; and steps of whole models on two, which are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port
from tiny_models import fresh

from stepcredit.estimators.frozen import fingerprint
from stepcredit.learn.adapters import add_adapters
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.learn.spread import shared_copy
from stepcredit.policy.forward import Policy, random_forest, score
from stepcredit.policy.loading import Loaded, empty_policy, load_policy

HERE = Path(__file__).parent
PROCESS = """
import json, logging, sys
import torch
import stepcredit.learn.loading as loading
from stepcredit.config import resolve
from stepcredit.estimators.frozen import Reference
from stepcredit.learn.adapters import add_adapters
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import Placement, copy_weights, full_state
from stepcredit.policy.forward import random_forest, score
from stepcredit.processes.ranks import Ranks

folder, case = sys.argv[1:]
torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO, format="%(message)s")
ranks = Ranks.join(60, "cpu")
dtype = "bfloat16" if case == "bfloat16" else "float32"
config = resolve({"model": folder, "train": {"device": "cpu", "dtype": dtype}})
forest, found = random_forest(50), {}

def scored(policy):
    return score(policy, forest, 1.0, 4096).logprobs.tolist()

if case == "ddp":
    placement = Placement(ranks, "ddp")
    policy = loading.load_model(config, folder, placement)
    learner = Learner(placement.place(policy), placement, AdamWOptions(learning_rate=1e-2), 20)
    found["steps"] = []
    for _ in range(3):
        parts, _ = learner.accumulate(forest, lambda part, call: (call(part).logprobs.sum(), None))
        assert len(parts) > 1
        found["steps"].append(learner.step()[0])
    found["scores"] = scored(policy)
elif case == "lora":
    placement = Placement(ranks, "fsdp")
    config = config.model_copy(update={"train": config.train.model_copy(update={"dtype": "bfloat16"})})
    policy = loading.load_model(config, folder, placement)
    add_adapters(policy, 4, 8.0, [], seed=0)
    found["base"] = str(policy.model.get_input_embeddings().weight.dtype)
    sampling = placement.sampling_copy(policy)
    learner = Learner(placement.place(policy), placement, AdamWOptions(learning_rate=1e-2), 4096)
    found["before"] = scored(policy)
    learner.accumulate(forest, lambda part, call: (call(part).logprobs.sum(), None))
    found["norm"], found["taken"] = learner.step()
    copy_weights(policy, sampling)
    found["scores"], found["sampling"] = scored(policy), scored(sampling)
    trained = {value.dtype for value in policy.parameters() if value.requires_grad}
    found["trained"] = [str(dtype) for dtype in trained]
else:
    if case == "no skeleton":
        loading.empty_policy = lambda *_: None
    placement = Placement(ranks, "fsdp")
    policy = loading.load_model(config, folder, placement)
    found["empty"] = all(value.is_meta for value in policy.model.parameters())
    reference = Reference(policy, 1.0, 4096, placement)
    sampling = placement.sampling_copy(policy)
    placement.place(policy)
    found["fingerprint"] = reference.fingerprint
    found["buffers"] = {name: value.tolist() for name, value in sampling.model.named_buffers()}
    model = sampling.model
    found["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    found["stop"] = policy.stop_token_ids
    sent = full_state(policy, types=lambda name, value: torch.bfloat16)
    exact = full_state(policy)
    found["sent"] = all(value.equal(exact[name].bfloat16()) for name, value in sent.items()) and len(sent) == len(exact)
    found["scores"], found["reference"], found["sampling"] = map(scored, (policy, reference.policy, sampling))
print(json.dumps(found))
ranks.barrier()
ranks.leave()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models with a tied and with an own output layer."""
    tokenizer, made = load_policy("embedded", "cpu").tokenizer, {}
    for family in ("qwen2", "qwen3", "mixtral"):
        made[family] = tmp_path_factory.mktemp(family)
        fresh(family, vocab_size=len(tokenizer)).model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


def two(folder: Path, case: str) -> tuple[list[dict], str]:
    """What both processes found, and the log of the first."""
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", PROCESS, str(folder), case]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [one.communicate(timeout=120) for one in started]
    assert [one.returncode for one in started] == [0, 0], "\n".join(log for _, log in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended], ended[0][1]


def near(found: list[float], policy: Policy) -> None:
    expected = score(policy, random_forest(50), 1.0, 4096).logprobs
    torch.testing.assert_close(torch.tensor(found), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), [("qwen2", "float32"), ("qwen3", "float32"), ("qwen3", "no skeleton")])
def test_one_process_reads_and_both_have_it(folders, family, case):
    """Weights, buffers that no file has, ties, the reference and the copy to sample with."""
    whole = load_policy(str(folders[family]), "cpu")
    found, log = two(folders[family], case)
    assert [one["empty"] for one in found] == [False, case != "no skeleton"]
    assert ("processes 1 read all weights" in log) == (case == "no skeleton")
    for one in found:
        for name in ("scores", "reference", "sampling"):
            near(one[name], whole)
        assert one["fingerprint"] == fingerprint(whole) and one["stop"] == whole.stop_token_ids
        assert one["sent"]
        assert one["tied"] == (family == "qwen2")
        buffers = dict(whole.model.named_buffers())
        assert one["buffers"].keys() == buffers.keys()
        assert all(torch.tensor(one["buffers"][name]).equal(value) for name, value in buffers.items())


@pytest.mark.slow
def test_the_copy_to_sample_with_goes_to_others_in_bf16(folders):
    found, _ = two(folders["qwen3"], "bfloat16")
    whole = load_policy(str(folders["qwen3"]), "cpu", "bfloat16")
    expected = score(whole, random_forest(50), 1.0, 4096).logprobs
    assert found[0]["sampling"] == found[1]["sampling"]
    assert float((torch.tensor(found[0]["sampling"]) - expected).abs().mean()) < 0.02


@pytest.mark.slow
def test_adapters_learn_on_shards_of_a_base_in_bf16(folders):
    """Frozen weights in bf16 and adapters in fp32 in one group of FSDP2; the copy to sample with follows."""
    found, _ = two(folders["qwen3"], "lora")
    policy = load_policy(str(folders["qwen3"]), "cpu", "bfloat16")
    add_adapters(policy, 4, 8.0, [], seed=0)
    learner = Learner(policy, UNSHARDED, AdamWOptions(learning_rate=1e-2), 4096)
    before = score(policy, random_forest(50), 1.0, 4096).logprobs
    learner.accumulate(random_forest(50), lambda part, call: (call(part).logprobs.sum(), None))
    norm, _ = learner.step()
    after = score(policy, random_forest(50), 1.0, 4096).logprobs
    moved = float((after - before).abs().mean())
    for one in found:
        assert one["base"] == "torch.bfloat16" and one["trained"] == ["torch.float32"] and one["taken"]
        assert one["norm"] == pytest.approx(norm, rel=0.1)
        for name, expected in (("before", before), ("scores", after), ("sampling", after)):
            assert float((torch.tensor(one[name]) - expected).abs().mean()) < min(0.05, moved / 3), name


@pytest.mark.slow
def test_whole_models_on_two_processes_take_the_steps_of_one(folders):
    """With several parts in a step, and weights afterwards."""
    found, _ = two(folders["qwen2"], "ddp")
    policy = load_policy(str(folders["qwen2"]), "cpu", "float32")
    learner = Learner(policy, UNSHARDED, AdamWOptions(learning_rate=1e-2), 4096)
    norms = []
    for _ in range(3):
        learner.accumulate(random_forest(50), lambda part, call: (call(part).logprobs.sum(), None))
        norms.append(learner.step()[0])
    for one in found:
        assert one["steps"] == pytest.approx(norms, rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(one["scores"]), score(policy, random_forest(50), 1.0, 4096).logprobs, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
def test_an_empty_policy_is_like_the_loaded_one(folders, family):
    whole = load_policy(str(folders[family]), "cpu")
    empty = empty_policy(str(folders[family]), Loaded.of(whole), "float32", torch.device("cpu"))
    assert empty is not None and all(value.is_meta for value in empty.parameters())
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert (empty.scoring_form, empty.stop_token_ids) == (whole.scoring_form, whole.stop_token_ids)
    assert (empty.positions, empty.vocabulary, empty.rope_limit) == (
        whole.positions,
        whole.vocabulary,
        whole.rope_limit,
    )


def test_a_model_that_is_another_by_its_config_is_not_made_empty(folders):
    """Then the process reads the weights, as it must."""
    whole, other = (load_policy(str(folders[family]), "cpu") for family in ("qwen2", "qwen3"))
    assert empty_policy(str(folders["qwen2"]), Loaded.of(other), "float32", torch.device("cpu")) is None
    assert empty_policy(str(folders["qwen2"]), Loaded.of(whole), "float32", torch.device("cpu")) is not None


def test_a_shared_copy_has_parameters_of_its_own():
    policy = fresh("qwen2")
    made = shared_copy(policy).requires_grad_(False)
    assert all(value.requires_grad for value in policy.parameters())
    pairs = list(zip(policy.parameters(), made.parameters(), strict=True))
    assert all(one is not two and one.data_ptr() == two.data_ptr() for one, two in pairs)
    assert made.model.get_input_embeddings().weight is made.model.get_output_embeddings().weight
