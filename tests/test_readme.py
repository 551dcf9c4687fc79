"""The README keeps its word: its first two commands, its code, its links."""

import importlib
import pathlib
import re

import numpy as np

from rlhfjax import experiment

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_it_opens_with_one_command_to_run_and_one_to_test():
    run, test = (block.strip() for block in blocks("bash")[:2])
    assert "\n" not in run and run.endswith("experiments/safe_rlhf/constrained_ppo.py")
    assert "\n" not in test and test.endswith("-m pytest")
    assert (ROOT / "experiments/safe_rlhf/constrained_ppo.py").exists()


def test_ci_runs_the_readmes_test_command():
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111 and "README.md" in ci.read_text()


def test_its_python_gives_what_its_comments_say():
    block, names = blocks("python")[0], {}  # test_huggingface.py and test_wrap.py run the others
    exec(compile(block, "README.md", "exec"), names)
    np.testing.assert_allclose(names["loss"], [0.802418], rtol=1e-5)
    np.testing.assert_allclose(names["advantages"], [[0.1267, 0.1333, 0.0]], atol=1e-4)
    assert np.isfinite(names["loss_per_token"])


def test_its_commands_name_options_that_exist():
    paper = importlib.import_module("experiments.safe_rlhf.constrained_ppo")
    pages = README + (ROOT / "experiments/safe_rlhf/README.md").read_text()
    lines = re.findall(r"python experiments/safe_rlhf/constrained_ppo\.py((?: --?[\w.-]+(?: [\w.]+)?)+)", pages)
    options = [line.split() for line in lines if "--help" not in line]
    assert ["--seed", "7", "--harm-limit", "0.1"] in options and ["--seeds", "5"] in options
    for argv in options:
        experiment._parse(paper.SCALES, argv)


def test_its_links_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("experiments/**/*.md"), *ROOT.glob("rlhfjax/**/*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing
