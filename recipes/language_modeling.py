"""Train a causal or masked language model with Back Razor.

    accelerate launch recipes/language_modeling.py --objective causal

needs no download: it trains a small GPT-2 (or BERT, with `--objective masked`) and its tokenizer from scratch
on the help topics that come with Python. `--model` and `--dataset` take Hub ids or local folders; `--dense`
trains without the razor, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
    GPT2Config,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from arguments import OneLineParser, add_shared_arguments, count, nonzero_fraction, razor_config
from checkpoints import Progress, batches_left, begin, chosen_checkpoint, save_checkpoint
from chosen_dataset import at_most, load_splits, require_column, require_text
from cpu_threads import use_cpu_threads
from hf_backrazor import get_razor_model, measure_saved_bytes
from offline_data import python_topics, train_tokenizer
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

METRIC = Path(__file__).parent / "metrics" / "perplexity_from_loss"
# Fixed, so that runs with different --seed are scored on the same masked tokens.
EVAL_MASK_SEED = 0
# The label of a token that is not to be predicted.
IGNORED = -100


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("causal", "masked"), default="causal")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_length", type=count, default=128, help="tokens in an example")
    parser.add_argument("--mask_share", type=nonzero_fraction, default=0.15, help="of tokens, for masked")
    parser.add_argument("--vocab_size", type=count, default=2048, help="of the default model")
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="with --dense: compute each block again in backward"
    )
    add_shared_arguments(parser, output_dir="runs/language_modeling", learning_rate=1e-3, batch_size=16, epochs=6)
    return parser.parse_args()


@process_group_outlives_models()
def main() -> None:
    args = parse_arguments()
    check_run_folder(args.output_dir, args.overwrite_output_dir)
    checkpoint = chosen_checkpoint(args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    check_plot(args.plot)
    config = razor_config(args)
    if args.gradient_checkpointing and not args.dense:
        stop("--gradient_checkpointing is for --dense; with razor, --preset compact computes blocks again in backward")

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
        splits = python_topics()
        train_rows, eval_rows = splits["train"], splits["test"]
    else:
        train_rows, eval_rows = load_splits(args.dataset, args.dataset_config, args.train_split, args.eval_split)
    require_column(train_rows, eval_rows, args.text_column, "--text_column")
    require_text(train_rows, args.text_column, "--text_column")

    if args.model is None:
        tokenizer = train_tokenizer(train_rows[args.text_column], args.vocab_size, args.max_length)
        if args.objective == "causal":
            small_gpt2 = GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=args.max_length,
                n_embd=192,
                n_layer=4,
                n_head=4,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            model = AutoModelForCausalLM.from_config(small_gpt2)
        else:
            small_bert = BertConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=args.max_length,
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                pad_token_id=tokenizer.pad_token_id,
            )
            model = AutoModelForMaskedLM.from_config(small_bert)
    else:
        auto_model = AutoModelForCausalLM if args.objective == "causal" else AutoModelForMaskedLM
        # Weights train in float32; --mixed_precision sets what the forward pass computes in.
        with stop_on_error(f"could not load the model {args.model!r}"):
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            model = auto_model.from_pretrained(args.model, dtype=torch.float32)
        if args.objective == "masked" and tokenizer.mask_token is None:
            stop(f"the tokenizer of {args.model!r} has no mask token, which --objective masked needs")
    # A cache would keep the keys and values of every layer whole. Generation has a setting of its own.
    model.config.use_cache = False
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))
    if not 2 <= args.max_length <= longest:
        stop(f"--max_length {args.max_length} is not between 2 and the model's {longest}")

    def cut_into_blocks(rows: dict[str, list]) -> dict[str, list]:
        # Texts end to end, so that no block holds padding; tokens that do not fill a last block are dropped.
        end = tokenizer.eos_token or tokenizer.sep_token or ""
        texts = [(text or "") + end for text in rows[args.text_column]]
        tokens = list(chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
        starts = range(0, len(tokens) - args.max_length + 1, args.max_length)
        return {"input_ids": [tokens[start : start + args.max_length] for start in starts]}

    def with_labels(rows: dict[str, list]) -> dict[str, list]:
        return {**rows, "labels": rows["input_ids"]}

    # One process goes first, so that the others find what it cached.
    with accelerator.main_process_first():
        train_set, eval_set = (
            rows.map(cut_into_blocks, batched=True, remove_columns=rows.column_names)
            for rows in (train_rows, eval_rows)
        )
    for split, blocks in (("training", train_set), ("evaluation", eval_set)):
        if len(blocks) == 0:
            stop(f"the {split} split is shorter than one example of --max_length {args.max_length} tokens")

    eval_set = at_most(eval_set, args.max_eval_examples)
    if args.objective == "causal":
        train_set, eval_set = (blocks.map(with_labels, batched=True) for blocks in (train_set, eval_set))
        collate = default_data_collator
    else:
        # New tokens are masked every time a block is trained on, the same ones every time it is scored. A batch's
        # number decides which: batches are collated ahead of their step, and a checkpoint may lie in between.
        batch_numbers = itertools.count()

        def collate(rows: list[dict[str, list]]) -> dict[str, torch.Tensor]:
            draw = np.random.default_rng((args.seed, accelerator.process_index, next(batch_numbers)))
            masking = DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=args.mask_share, seed=int(draw.integers(2**63))
            )
            return masking(rows)

        mask_once = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=args.mask_share, seed=EVAL_MASK_SEED, return_tensors="np"
        )
        eval_set = eval_set.map(
            lambda rows: dict(mask_once([{"input_ids": ids} for ids in rows["input_ids"]])), batched=True
        )
    # Its own generator, so that an epoch that is gone on with leaves the random numbers of training alone.
    train_loader = DataLoader(
        train_set, batch_size=args.batch_size, shuffle=True, collate_fn=collate, generator=torch.Generator()
    )
    eval_loader = DataLoader(eval_set, batch_size=args.eval_batch_size, collate_fn=default_data_collator)

    # The razor is one call. The report comes before accelerator.prepare, which may wrap the model.
    model.to(accelerator.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
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
    batch_numbers = itertools.count(done.batches)
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
                logits = model(**batch).logits.float()
            if args.objective == "causal":
                # Each token is predicted from those before it.
                logits, labels = logits[:, :-1], labels[:, 1:]
            token_losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
            losses_and_tokens = (token_losses.sum(1), (labels != IGNORED).sum(1))
            # Drops the examples that were repeated to fill the last batch of every process.
            losses_of_blocks, tokens = accelerator.gather_for_metrics(losses_and_tokens)
            metric.add_batch(predictions=losses_of_blocks, references=tokens)
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
                partial(
                    save_training_plot,
                    task=f"{args.objective.capitalize()} language modeling",
                    default_model="small GPT-2" if args.objective == "causal" else "small BERT",
                    metrics=metrics,
                )
            )
        save_run(args.output_dir, metrics, *savers)
        print(closing_table(scores, saved_bytes, step))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
