"""Runs with a remote sampler."""

import re

import pytest
import torch
from fake_server import COMPLETIONS, Reply, rows, train
from safetensors.torch import load_file

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import OldPolicy
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.placement import UNSHARDED
from stepcredit.policy.forward import score
from stepcredit.run.build import build_estimators, build_parts
from stepcredit.samplers.remote import weights
from stepcredit.samplers.table import build_sampler


def test_a_run(policy, fakes, tmp_path):
    """Two iterations; the server has the weights of each, although it is started anew between them."""
    fake = fakes(model=True)

    def forget(found: Reply) -> Reply:
        fake.version = ""
        fake.sampler.policy.model.load_state_dict(policy.model.state_dict())
        return found

    fake.fail("/metrics", [lambda found: found, forget])  # it is looked at after each load
    assert train(fake, tmp_path / "run", "--group-size", "4", "--objective.importance", "token") == 0
    found = rows(tmp_path / "run")[1:]
    assert len(found) == 2
    for row in found:
        assert row["sampler/logprob_diff_mean"] < 1e-4 and abs(row["sampler/ratio"] - 1) < 1e-4
        assert row["policy/entropy"] > 0 and row["sampler/truncated"] == 0
        assert 0 <= row["sampler/prefix_hits"] < 1
    assert [version.rsplit("-", 1)[1] for _, version in fake.loads] == ["1", "2", "2", "3"]
    end = load_file(tmp_path / "run" / "checkpoints" / "000002" / "model.safetensors")
    served = fake.sampler.policy.model.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in end.items())
    start = policy.model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in end.items())
    assert not list(weights.MEMORY.iterdir())


def test_a_run_with_trees(fakes, tmp_path):
    fake = fakes(model=True)
    options = ["--algorithm", "treerpo", "--growth.num-branches", "2", "--growth.depth", "2", "--iterations", "1"]
    assert train(fake, tmp_path / "run", *options, "--objective.importance", "sequence") in (0, 1)
    assert rows(tmp_path / "run")[1]["sampler/logprob_diff_mean"] < 1e-4


def test_other_weights_end_a_run(fakes, tmp_path, capsys):
    """A server that says that it has the weights, and samples with others."""
    fake = fakes(model=True)
    fake.takes = False
    with torch.no_grad():
        for weight in fake.sampler.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert train(fake, tmp_path / "run", "--group-size", "4") == 2
    error = capsys.readouterr().err
    mean, most, share = re.search(r"by ([\d.]+) nats on average \(at most ([\d.]+), (\d+)%", error).groups()
    assert 0.05 < float(mean) < float(most) and int(share) > 10
    assert "server has other weights" in error


def config(**server_options):
    return resolve({"sampler": {"name": "vllm", "server": server_options}})


def test_old_logprobs_and_entropy_come_from_the_trainer(policy):
    """Even where a step is exactly on-policy."""
    given = config(launch=True)
    assert set(build_estimators(given, build_parts(given), policy)) == {"old_logprobs"}
    ours = resolve({})
    assert build_estimators(ours, build_parts(ours), policy) == {}
    columns = {"rollout_logprobs": [-1.0, -2.0, -3.0]}
    forest = Forest.from_trees([Tree(Problem(), [1, 5], [Segment([7, 8, 2], columns=columns)])])
    found = OldPolicy(policy, 0.7, 1000).observe(forest)
    scores = score(policy, forest, 0.7, 1000)
    assert torch.equal(found.token["old_logprobs"], scores.logprobs)
    assert torch.equal(found.token["entropy"], scores.entropy) and bool((scores.entropy > 0).all())
    there = forest.with_token(entropy=torch.ones(3))
    assert OldPolicy(policy, 0.7, 1000).observe(there).token["entropy"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, {"urls": "http://127.0.0.1:1", "launch": True}])
def test_servers_or_one_of_its_own(policy, options):
    with pytest.raises(UserError, match=r"needs running servers .* not both"):
        build_sampler(config(**options), policy, UNSHARDED)


def test_options_at_which_there_are_no_logprobs(fakes, tmp_path, capsys):
    """Refused before a server is asked for anything; looking needs no log-probabilities."""
    fake = fakes(model=True)
    options = ["--temperature", "0.7", "--sampler.top-p", "0.9"]
    assert train(fake, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert "sampler.top_p 0.9" in error and "--sampler.temperature 1" in error and error.count("\n") == 1
    assert not fake.requests and not (tmp_path / "run").exists()
    words = ["--sampler.name", "vllm", "--sampler.server.urls", fake.url, "--num-problems", "2", *options]
    assert main(["eval", *words, "--max-new-tokens", "8"]) == 0
    assert {body["top_p"] for path, body in fake.requests if path == COMPLETIONS} == {0.9}
