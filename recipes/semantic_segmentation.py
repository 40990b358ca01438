"""Train a model for semantic segmentation with Back Razor: a class for each pixel of an image.

    accelerate launch recipes/semantic_segmentation.py

needs no download: it trains a small SegFormer from scratch to find handwritten digits on photographs, both of them
scikit-learn's. `--model` and `--dataset` take Hub ids or local folders; `--dense` trains without the razor, for
comparison.
"""

from __future__ import annotations

import argparse
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
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from arguments import OneLineParser, add_shared_arguments, count, razor_config, whole
from checkpoints import Progress, batches_left, begin, chosen_checkpoint, save_checkpoint
from chosen_class_maps import class_names, require_class_maps
from chosen_dataset import at_most, load_splits, require_column, require_images
from class_maps import IGNORED, class_map, count_pixels
from cpu_threads import use_cpu_threads
from digits_on_photographs import CLASS_NAMES, SIZE, digits_on_photographs
from hf_backrazor import freeze_batch_norms, get_razor_model, measure_saved_bytes
from image_pixels import as_pil_image
from offline_data import small_segformer_config
from one_line_errors import stop_on_error
from peak_memory import StepPeaks
from process_groups import process_group_outlives_models
from run_folder import (
    check_run_folder,
    closing_table,
    library_versions,
    median_step_seconds,
    save_run,
    saved_bytes_summary,
)
from segmentation_picture import save_predictions
from training_plot import check_plot, run_settings, save_training_plot

NEAREST = 0  # Pillow's number for taking the value of the nearest pixel
METRIC = Path(__file__).parent / "metrics" / "mean_iou"


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="annotation", help="with a class number for each pixel")
    parser.add_argument("--labels", help="json file of class names, where the dataset has none: a list, or by number")
    parser.add_argument(
        "--image_size",
        type=count,
        help=f"images are scaled to this square (default: as the model's image processor does; {SIZE} without --model)",
    )
    parser.add_argument("--fixed_batch_norm", action="store_true", help="batch norms keep their statistics and weights")
    parser.add_argument("--pictures", type=whole, default=4, help="images in predictions.png (0: no such file)")
    add_shared_arguments(parser, output_dir="runs/semantic_segmentation", learning_rate=3e-3, batch_size=8, epochs=10)
    return parser.parse_args()


@process_group_outlives_models()
def main() -> None:
    args = parse_arguments()
    check_run_folder(args.output_dir, args.overwrite_output_dir)
    checkpoint = chosen_checkpoint(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    check_plot(args.plot)
    check_plot(args.pictures > 0, "--pictures")
    config = razor_config(args)

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
        splits = digits_on_photographs()
        train_rows, eval_rows = splits["train"], splits["test"]
    else:
        train_rows, eval_rows = load_splits(args.dataset, args.dataset_config, args.train_split, args.eval_split)
    require_column(train_rows, eval_rows, args.image_column, "--image_column")
    require_column(train_rows, eval_rows, args.label_column, "--label_column")
    channels = require_images(train_rows, args.image_column, "--image_column")
    eval_rows = at_most(eval_rows, args.max_eval_examples)

    if args.model is None:
        size = args.image_size or SIZE
        # Looked up here and not imported above: Transformers warns of what it does without torchvision.
        processor = transformers.SegformerImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5] * channels, image_std=[0.5] * channels
        )
    else:
        changes: dict[str, Any] = {}
        if args.image_size:
            square = {"height": args.image_size, "width": args.image_size}
            changes = {"do_resize": True, "size": square, "keep_aspect_ratio": False, "do_center_crop": False}
        with stop_on_error(f"could not load the image processor of the model {args.model!r}"):
            processor = AutoImageProcessor.from_pretrained(args.model, **changes)
        require_class_maps(processor, args.model)

    label_names = class_names(
        train_rows,
        eval_rows,
        args.image_column,
        args.label_column,
        labels_file=args.labels,
        known=CLASS_NAMES if args.dataset is None else None,
        reduced=processor.do_reduce_labels,
    )
    labels = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: index for index, label in enumerate(label_names)},
    }
    if args.model is None:
        model = AutoModelForSemanticSegmentation.from_config(small_segformer_config(channels, **labels))
    else:
        # Weights train in float32; --mixed_precision sets what the forward pass computes in.
        with stop_on_error(f"could not load the model {args.model!r}"):
            model = AutoModelForSemanticSegmentation.from_pretrained(
                args.model, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
            )
        channels = getattr(model.config, "num_channels", 3)
    # What the loss leaves out; UperNet has the second name for it.
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if hasattr(model.config, name):
            setattr(model.config, name, IGNORED)

    def pil_images(rows: dict[str, list]) -> list[Any]:
        return [as_pil_image(image, channels) for image in rows[args.image_column]]

    def read_images(rows: dict[str, list]) -> dict[str, Any]:
        images, maps = pil_images(rows), [class_map(annotation) for annotation in rows[args.label_column]]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        # Annotations by themselves: BEiT's and DPT's processors scale them as they do images, which mixes classes.
        labels = processor(images, segmentation_maps=maps, resample=NEAREST, return_tensors="pt")["labels"]
        return {"pixel_values": pixel_values, "labels": labels}

    # Read when a batch asks for them: a data set of images may not fit in memory.
    train_set = train_rows.with_transform(read_images)
    eval_set = eval_rows.with_transform(read_images)
    collate = default_data_collator
    # Batch norms behind a global pooling cannot train on a last batch of one image.
    whole_batches = len(train_set) >= args.batch_size * accelerator.num_processes
    # Its own generator, so that an epoch that is gone on with leaves the random numbers of training alone.
    train_loader = DataLoader(
        train_set,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=whole_batches,
        collate_fn=collate,
        generator=torch.Generator(),
    )
    eval_loader = DataLoader(eval_set, batch_size=args.eval_batch_size, collate_fn=collate)

    model.to(accelerator.device)
    if args.image_size:
        # Some models take images of one size only, and none the smallest.
        pixel_values = train_set[0]["pixel_values"][None].to(accelerator.device)
        with stop_on_error(f"--image_size {args.image_size} does not suit the model"), torch.no_grad():
            model.eval()(pixel_values)

    if args.fixed_batch_norm:
        # As in the paper's training of convolutional networks: neither their statistics nor their weights change.
        with stop_on_error("--fixed_batch_norm"):
            model = freeze_batch_norms(model)

    # The razor is one call. The report comes before accelerator.prepare, which may wrap the model.
    if config is not None:
        with stop_on_error("the razor cannot be put into this model"):
            model = get_razor_model(model, config)
    dense_bytes, razor_bytes = 0, None
    if accelerator.is_main_process:
        first = [train_set[index] for index in range(min(args.batch_size, len(train_set)))]
        batch = {name: tensor.to(accelerator.device) for name, tensor in collate(first).items()}
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
        drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in tqdm(eval_loader, "evaluating", leave=False, disable=hide_progress):
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            # As the models' losses do it, but one image at a time: logits of all pixels of a batch are large.
            scaled = (interpolate(one[None], labels.shape[-2:], mode="bilinear")[0] for one in logits)
            predictions = torch.stack([of_image.argmax(0) for of_image in scaled])
            # Drops the examples that were repeated to fill the last batch of every process.
            predictions, labels = accelerator.gather_for_metrics((predictions, labels))
            metric.add_batch(**count_pixels(predictions, labels))
            room = args.pictures - len(drawn)
            drawn += zip(predictions[:room].cpu(), labels[:room].cpu(), strict=True)
        scores = metric.compute(num_labels=len(label_names), ignore_index=IGNORED)
        iou_by_class = dict(zip(label_names, scores.pop("per_class_iou"), strict=True))
        done.end_epoch(scores)
    progress.close()
    train_seconds = done.seconds_so_far()

    if accelerator.is_main_process:
        saved_bytes = saved_bytes_summary(dense_bytes, razor_bytes)
        step = median_step_seconds(done.step_seconds)
        metrics = {
            **scores,
            "iou_by_class": iou_by_class,
            "saved_bytes": saved_bytes,
            "memory_mib": memory.summary(),
            "median_step_seconds": step,
            "train_seconds": train_seconds,
            "steps": total_steps,
            "processes": accelerator.num_processes,
            "history": done.history,
            "step_losses": done.step_losses,
            "arguments": vars(args),
            "versions": library_versions(),
        }
        savers = [accelerator.unwrap_model(model).save_pretrained, processor.save_pretrained]
        task, default_model = "Semantic segmentation", "small SegFormer"
        if args.plot:
            savers.append(partial(save_training_plot, task=task, default_model=default_model, metrics=metrics))
        if args.pictures:
            plain = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False}
            images = processor(pil_images(eval_rows[: len(drawn)]), return_tensors="pt", **plain)["pixel_values"]
            title = f"{run_settings(vars(args), default_model)}: mean IoU {scores['mean_iou']:.3f}"
            savers.append(partial(save_predictions, images=images, maps=drawn, names=label_names, title=title))
        save_run(args.output_dir, metrics, *savers)
        print(closing_table(scores, saved_bytes, step))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
