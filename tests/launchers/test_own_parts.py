"""README's page for a model and data of one's own: the example as it stands there, its commands as they are typed."""

import re

import pytest
from running import ROOT, run

pytestmark = pytest.mark.launch
PAGE = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Your own model and data\n")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^    ((?:python|torchrun) .*)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout in which the example has been saved."""
    made = tmp_path_factory.mktemp("checkout")
    for name in ("common", "launchers", "benchmarks"):
        (made / name).symlink_to(ROOT / name)
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (made / "my_job.py").write_text(example)
    return made


def test_the_commands_train_compare_and_predict(folder):
    trains, again, compares, predicts = COMMANDS
    ended = run(trains.split(), cwd=folder)
    assert ended.status == 0 and (folder / "reader.pth").exists(), ended
    (accuracy,) = re.findall(r"^Epoch \[3/3\] .* Eval Accuracy: ([\d.]+) %$", ended.out, re.MULTILINE)
    assert float(accuracy) > 90
    other = run(again.split(), cwd=folder)
    assert f"Eval Accuracy: {accuracy} %" in other.out, other
    shown = run(predicts.split(), cwd=folder)
    said = r"my_job:Lines, evaluation sample 3: (English|Python) \(it is (English|Python)\)\n"
    assert shown.status == 0 and re.match(said, shown.out), shown
    compared = run(compares.split(), cwd=folder, limit=280)
    assert compared.status == 0 and "agree with the single process" in compared.out, compared
