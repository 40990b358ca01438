"""Train LoRA adapters of an image classifier with Back Razor.

    accelerate launch recipes/vision_lora.py

needs no download: pip brings no pretrained ViT, so a small one first learns scikit-learn's handwritten digits 0 to 4,
all of its weights, densely; then LoRA adapts it to the digits 5 to 9. `--model` and `--dataset` take Hub ids or local
folders (with Pillow installed); `--dense` trains the adapters without the razor, for comparison.

LoRA trains few weights and yet saves most of what full fine-tuning does. A frozen layer saves no input, razor or not;
but gradients pass through every norm, activation function and attention on their way to the adapters, and each of these
saves what it always did. That is what the razor shrinks.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    default_data_collator,
    get_linear_schedule_with_warmup,
)
from transformers.utils import is_vision_available

from arguments import OneLineParser, add_shared_arguments, count, fraction, razor_config
from checkpoints import Progress, batches_left, begin, chosen_checkpoint, save_checkpoint
from chosen_dataset import at_most, load_splits, require_column, require_images, with_class_labels
from cpu_threads import use_cpu_threads
from hf_backrazor import get_razor_model, measure_saved_bytes
from image_pixels import PlainImageProcessor, as_pil_image
from offline_data import handwritten_digits
from one_line_errors import stop, stop_on_error
from peak_memory import StepPeaks
from pretrained_on_digits import CHANNELS, IMAGE_SIZE, NEW, vit_that_knows_half
from process_groups import process_group_outlives_models
from run_folder import (
    check_run_folder,
    closing_table,
    library_versions,
    median_step_seconds,
    save_run,
    saved_bytes_summary,
)
from training_plot import check_plot, save_training_plot

METRIC = Path(__file__).parent / "metrics" / "accuracy"
# The layer that has to be new for new classes: trained in full and saved with the adapters.
HEAD = "classifier"


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--pretraining_epochs", type=count, default=8, help="of the default model, on digits 0 to 4")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora_rank", type=count, default=8)
    lora.add_argument("--lora_alpha", type=count, default=16, help="the adapters' output is scaled by alpha / rank")
    # With dropout every adapter draws a mask of its own, and the inputs of q's and v's A are no longer one tensor.
    lora.add_argument("--lora_dropout", type=fraction, default=0.0)
    lora.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"], help="layers that get adapters")
    add_shared_arguments(parser, output_dir="runs/vision_lora", learning_rate=3e-3, batch_size=32, epochs=15)
    return parser.parse_args()


@process_group_outlives_models()
def main() -> None:
    args = parse_arguments()
    check_run_folder(args.output_dir, args.overwrite_output_dir)
    checkpoint = chosen_checkpoint(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    check_plot(args.plot)
    config = razor_config(args)
    if args.model is None and args.dataset is not None:
        stop("--dataset needs a pretrained model to adapt to it: choose one with --model")

    with stop_on_error("could not start Accelerate"):
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            # The seed alone orders the batches, so that razor and dense runs see the same ones.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            project_config=ProjectConfiguration(total_limit=args.checkpoints_total_limit),
        )
    use_cpu_threads(accelerator, args.threads)
    hide_progress = not accelerator.is_local_main_process
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    set_seed(args.seed)

    if args.dataset is None:
        splits = handwritten_digits(NEW)
        train_rows, eval_rows = splits["train"], splits["test"]
    else:
        train_rows, eval_rows = load_splits(args.dataset, args.dataset_config, args.train_split, args.eval_split)
    require_column(train_rows, eval_rows, args.image_column, "--image_column")
    require_column(train_rows, eval_rows, args.label_column, "--label_column")
    require_images(train_rows, args.image_column, "--image_column")
    train_rows, eval_rows, class_names = with_class_labels(train_rows, eval_rows, args.label_column)
    eval_rows = at_most(eval_rows, args.max_eval_examples)

    labels = {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {label: index for index, label in enumerate(class_names)},
    }
    if args.model is None:
        processor = PlainImageProcessor(IMAGE_SIZE, CHANNELS)
        model = vit_that_knows_half(args.pretraining_epochs, accelerator.device, **labels)
        # Where the run folder will have it, for those who load the adapters.
        model.name_or_path = str(Path(args.output_dir) / "base_model")
    else:
        if not is_vision_available():
            stop("--model needs Pillow for its image processor: pip install pillow")
        # Weights train in float32; --mixed_precision sets what the forward pass computes in.
        with stop_on_error(f"could not load the model {args.model!r}"):
            processor = AutoImageProcessor.from_pretrained(args.model)
            model = AutoModelForImageClassification.from_pretrained(
                args.model, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
            )
        channels = getattr(model.config, "num_channels", 3)
    if not hasattr(model, HEAD):
        stop(f"the model {args.model!r} has no layer called {HEAD}, which is what this recipe trains beside adapters")

    def read_images(rows: dict[str, list]) -> dict[str, Any]:
        images = rows[args.image_column]
        if args.model is not None:
            images = [as_pil_image(image, channels) for image in images]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": rows[args.label_column]}

    # Read when a batch asks for them: a data set of images may not fit in memory.
    train_set = train_rows.with_transform(read_images)
    eval_set = eval_rows.with_transform(read_images)
    collate = default_data_collator
    # Its own generator, so that an epoch that is gone on with leaves the random numbers of training alone.
    train_loader = DataLoader(
        train_set, batch_size=args.batch_size, shuffle=True, collate_fn=collate, generator=torch.Generator()
    )
    eval_loader = DataLoader(eval_set, batch_size=args.eval_batch_size, collate_fn=collate)

    model.to(accelerator.device)
    # PEFT changes the model in place, and whoever loads the adapters needs what it was.
    base_model = copy.deepcopy(model) if args.model is None else None
    first = [train_set[index] for index in range(min(args.batch_size, len(train_set)))]
    batch = {name: tensor.to(accelerator.device) for name, tensor in collate(first).items()}
    full_bytes, dense_bytes, razor_bytes = 0, 0, None
    if accelerator.is_main_process:
        with accelerator.autocast():
            full_bytes = measure_saved_bytes(model, **batch).total

    # Adapters first, then the razor, which so finds the adapters' own layers as well: the A of q and v read what the
    # norm before them gave out, and take next to nothing beside the norm's packed copy.
    with stop_on_error(f"no adapters can be put into --target_modules {' '.join(args.target_modules)}"):
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.target_modules,
            modules_to_save=[HEAD],
        )
        model = get_peft_model(model, lora)
    if config is not None:
        with stop_on_error("the razor cannot be put into this model"):
            model = get_razor_model(model, config)
    # The report comes before accelerator.prepare, which may wrap the model.
    if accelerator.is_main_process:
        with accelerator.autocast():
            if config is None:
                dense_bytes = measure_saved_bytes(model, **batch).total
            else:
                report = model.memory_report(**batch)
                dense_bytes, razor_bytes = report.dense_bytes, report.razor_bytes
                print(report)
    accelerator.wait_for_everyone()

    # Biases and norms are left out of weight decay.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)

    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    # Not prepared: a prepared schedule advances once for each process, this one once for each optimizer step.
    schedule = get_linear_schedule_with_warmup(optimizer, int(args.warmup_ratio * total_steps), total_steps)
    with accelerator.main_process_first():
        metric = evaluate.load(str(METRIC), keep_in_memory=True)
    # Each process draws its own dropout.
    set_seed(args.seed, device_specific=True)

    # Checkpoints hold these beside the weights, the optimizer and the random states.
    done = Progress(total_steps, len(train_loader), accelerator.num_processes)
    memory = StepPeaks(accelerator.device)
    accelerator.register_for_checkpointing(schedule, done, memory)
    if base_model is not None:
        accelerator.register_for_checkpointing(base_model)
    begin(accelerator, args.output_dir, checkpoint)
    progress = tqdm(total=total_steps, initial=done.steps, desc="training", disable=hide_progress)
    while not done.finished:
        model.train()
        step_started = time.perf_counter()
        memory.start_step()
        for batch in batches_left(accelerator, train_loader, done):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            # item() waits for the device, so the clock below stops when the work does.
            done.losses.append(loss.item())
            if accelerator.sync_gradients:
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()
                done.step_seconds.append(time.perf_counter() - step_started)
                memory.end_step()
                done.step_losses.append(done.losses[-1])
                progress.update()
                progress.set_postfix(loss=f"{done.losses[-1]:.3f}")
                if args.checkpointing_steps and done.steps % args.checkpointing_steps == 0:
                    save_checkpoint(accelerator, args.output_dir, done.steps)
                    memory.start_step()
                step_started = time.perf_counter()
            if done.steps == total_steps:
                break

        model.eval()
        for batch in tqdm(eval_loader, "evaluating", leave=False, disable=hide_progress):
            labels = batch.pop("labels")
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(-1)
            # Drops the examples that were repeated to fill the last batch of every process.
            predictions, labels = accelerator.gather_for_metrics((predictions, labels))
            metric.add_batch(predictions=predictions, references=labels)
        scores = metric.compute()
        done.end_epoch(scores)
    progress.close()
    train_seconds = done.seconds_so_far()

    if accelerator.is_main_process:
        saved_bytes = {"full_fine_tuning": full_bytes, **saved_bytes_summary(dense_bytes, razor_bytes)}
        step = median_step_seconds(done.step_seconds)
        metrics = {
            **scores,
            "saved_bytes": saved_bytes,
            "memory_mib": memory.summary(),
            "median_step_seconds": step,
            "train_seconds": train_seconds,
            "steps": total_steps,
            "processes": accelerator.num_processes,
            "trained_parameters": sum(parameter.numel() for parameter in trained),
            "history": done.history,
            "step_losses": done.step_losses,
            "arguments": vars(args),
            "versions": library_versions(),
        }
        # PEFT would look into the base model for words that were added to a vocabulary.
        save_adapters = partial(accelerator.unwrap_model(model).save_pretrained, save_embedding_layers=False)
        savers = [save_adapters, processor.save_pretrained]
        if base_model is not None:
            savers.append(lambda folder: base_model.save_pretrained(Path(folder) / "base_model"))
        if args.plot:
            savers.append(
                partial(
                    save_training_plot, task="LoRA of an image classifier", default_model="small ViT", metrics=metrics
                )
            )
        save_run(args.output_dir, metrics, *savers)
        print(closing_table(scores, saved_bytes, step))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
