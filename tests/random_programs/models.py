"""Whole tiny models of Transformers, with losses on top."""

from __future__ import annotations

from random import Random

_SIZES = "hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24"
_BERT = f"BertConfig(vocab_size=37, max_position_embeddings=16, {_SIZES}, hidden_dropout_prob=P)"
_LLAMA = f"Config(vocab_size=37, num_key_value_heads=1, max_position_embeddings=16, {_SIZES}, attention_dropout=P)"
_IMAGE = f"ViTConfig(image_size=8, patch_size=4, num_labels=5, {_SIZES}, hidden_dropout_prob=P)"
_LANGUAGE_MODELS = {
    "GPT2LMHeadModel": "GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=P)",
    "LlamaForCausalLM": f"Llama{_LLAMA}",
    "Qwen2ForCausalLM": f"Qwen2{_LLAMA}",
    "Gemma2ForCausalLM": f"Gemma2{_LLAMA[:-1]}, head_dim=8, final_logit_softcapping=3.0)",
    "BertForMaskedLM": _BERT,
}
_CLASSIFIERS = {
    "BertForSequenceClassification": (_BERT, "ids"),
    "ViTForImageClassification": (_IMAGE, "torch.randn((BATCH, 3, 8, 8), dtype=DTYPE)"),
    "ResNetForImageClassification": (
        "ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type=KIND, num_labels=5)",
        "torch.randn((BATCH, 3, 33, 29), dtype=DTYPE)",
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2, num_labels=5)",
        "torch.randn((BATCH, 3, 16, 16), dtype=DTYPE)",
    ),
    "MobileNetV2ForImageClassification": (
        "MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=5)",
        "torch.randn((BATCH, 3, 32, 32), dtype=DTYPE)",
    ),
}
_SEGFORMER = (
    "SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],"
    " strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=4)"
)

# Of a language model: the labels are the ids.
_LANGUAGE_LOSSES = {
    "its own": "loss = model(input_ids=x, labels=x).loss",
    "its own, with padding": "mask = torch.ones_like(x)\nmask[0, 3:] = 0\n"
    "loss = model(input_ids=x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss",
    "cross entropy outside": "logits = model(input_ids=x).logits\n"
    "loss = F.cross_entropy(logits.view(-1, 37), x.flatten())",
    "label smoothing outside": "logits = model(input_ids=x).logits[:, :-1]\n"
    "loss = F.cross_entropy(logits.reshape(-1, 37), x[:, 1:].flatten(), label_smoothing=0.1)",
    "log_softmax outside": "logits = model(input_ids=x).logits\n"
    "loss = -F.log_softmax(logits, -1).gather(-1, x[..., None]).mean()",
    "custom Function": "loss = function_loss(model(input_ids=x).logits)",
    "TorchScript": "loss = scripted_loss(model(input_ids=x).logits)",
    "hidden states": "out = model(input_ids=x, output_hidden_states=True)\n"
    "loss = out.hidden_states[-1].square().mean()",
    "logits and hidden states": "out = model(input_ids=x, labels=x, output_hidden_states=True)\n"
    "loss = out.loss + out.logits.square().mean() + out.hidden_states[1].square().mean()",
    "logits read first": 'out = model(input_ids=x, labels=x)\nrecord("best", out.logits.argmax(-1))\nloss = out.loss',
    "logits changed": "logits = model(input_ids=x).logits\nlogits[..., 0] = 0\nloss = weighted_sum(logits / 2)",
    "logits checkpointed": "loss = checkpoint(weighted_sum, model(input_ids=x).logits, use_reentrant=True)",
    "logits kept": "logits = model(input_ids=x).logits\nlogits.retain_grad()\nmodel.kept = [logits]\n"
    "loss = class_loss(logits)",
    "some positions": "logits = model(input_ids=x).logits[:, ::2]\nloss = class_loss(logits)",
    "embeddings": "embedded = model.get_input_embeddings()(x)\nloss = model(inputs_embeds=embedded, labels=x).loss",
    "dropped loss": "out = model(input_ids=x, labels=x)\nloss = weighted_sum(out.logits)",
}
_CLASS_LOSSES = {
    "its own": "loss = model(x, labels=torch.arange(len(x)).remainder(LABELS)).loss",
    "weighted sum": "loss = weighted_sum(model(x).logits)",
    "label smoothing": "loss = class_loss(model(x).logits, label_smoothing=0.1)",
    "custom Function": "loss = function_loss(model(x).logits)",
    "hidden states": "out = model(x, output_hidden_states=True)\n"
    "loss = sum(h.square().mean() for h in out.hidden_states)",
}
_MAP_LOSSES = {
    "its own": "labels = torch.arange(x[:, 0].numel()).remainder(4).view(x[:, 0].shape)\n"
    "loss = model(x, labels=labels).loss",
    "with ignored pixels": "labels = torch.arange(x[:, 0].numel()).remainder(4).view(x[:, 0].shape)\n"
    "labels[:, :3] = 255\nloss = model(x, labels=labels).loss",
    "weighted sum": "loss = weighted_sum(model(x).logits)",
    "resized outside": "logits = F.interpolate(model(x).logits, size=x.shape[2:], mode='bilinear')\n"
    "loss = class_loss(logits.permute(0, 2, 3, 1))",
    "custom Function": "loss = function_loss(model(x).logits)",
}


def draw_model(rng: Random) -> tuple[str, str, str, tuple[str, ...], list[str]]:
    """Code of a model, code of its input, what that is, lines that compute the loss, and features."""
    batch, dropout = rng.choice((1, 2, 3)), rng.choice((0.0, 0.0, 0.2))
    ids = f"torch.randint(1, 37, ({batch}, {rng.choice((4, 6, 7))}))"
    draw = rng.random()
    if draw < 0.55:
        name = rng.choice(list(_LANGUAGE_MODELS))
        config, x, losses, kind = _LANGUAGE_MODELS[name], ids, _LANGUAGE_LOSSES, "ids"
    elif draw < 0.9:
        name = rng.choice(list(_CLASSIFIERS))
        (config, x), losses, kind = _CLASSIFIERS[name], _CLASS_LOSSES, "images"
        x, kind = (ids, "ids") if x == "ids" else (x.replace("BATCH", str(max(2, batch))), "images")
    else:
        name, config, losses, kind = "SegformerForSemanticSegmentation", _SEGFORMER, _MAP_LOSSES, "images"
        x = f"torch.randn(({batch + 1}, 3, 16, 20), dtype=DTYPE)"
    config = config.replace("=P", f"={dropout}").replace("KIND", f'"{rng.choice(("basic", "bottleneck"))}"')
    config = ", ".join(f"transformers.{part}" if part.split("(")[0].endswith("Config") else part
                       for part in [config])  # fmt: skip
    knows_sdpa = not name.startswith(("ResNet", "ConvNext", "MobileNet", "Segformer", "Gemma2"))
    attention = rng.choice(("sdpa", "eager")) if knows_sdpa else "eager"
    loss = rng.choice(list(losses))
    labels = "2" if name.startswith("Bert") else "5"
    model = f'transformers.{name}._from_config({config}, attn_implementation="{attention}")'
    lines = tuple(losses[loss].replace("LABELS", labels).splitlines())
    return model, x, kind, lines, [name, f"{'model' if losses is not _LANGUAGE_LOSSES else 'LM'} loss: {loss}"]
