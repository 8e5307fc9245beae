"""Map the arrays of the authors' models to our parameters."""

_BLOCK = "deq.function."
_LANGUAGE = {
    "pos_emb.": "embedding.position.",
    "tok_emb.": "embedding.token.",
    "head.": "head.",
    f"{_BLOCK}norm": "equilibrium.f.norm",
    f"{_BLOCK}attention.W_q.": "equilibrium.f.attention.query.",
    f"{_BLOCK}attention.W_k.": "equilibrium.f.attention.key.",
    f"{_BLOCK}attention.W_v.": "equilibrium.f.attention.value.",
    f"{_BLOCK}attention.attention.query_proj.": "equilibrium.f.attention.inner.0.",
    f"{_BLOCK}attention.attention.key_proj.": "equilibrium.f.attention.inner.1.",
    f"{_BLOCK}attention.attention.value_proj.": "equilibrium.f.attention.inner.2.",
    f"{_BLOCK}attention.attention.output_proj.": "equilibrium.f.attention.output.",
    f"{_BLOCK}mlp.layers.0.": "equilibrium.f.mlp.0.",
    f"{_BLOCK}mlp.layers.1.": "equilibrium.f.mlp.2.",
    f"{_BLOCK}mlp.layers.2.": "equilibrium.f.mlp.4.",
}
_CLASSIFIER = {
    "encoder_conv.": "stem.0.",
    "encoder_norm.": "stem.1.",
    "deq_layers.": "equilibria.",
    "down_layers.": "downsamples.",
    "final_linear.": "head.",
}
_UNUSED = ("norm.", f"{_BLOCK}attention.mask")
"""A norm that the released language model creates and never applies, and a constant that it counts as a weight."""


def our_name(model: str, their_path: str) -> str | None:
    """Our name of an array, given by its path in their `language` or `classifier` model; None for an unused one."""
    name = their_path.lstrip(".").replace("[", ".").replace("]", "")
    if model == "language" and name.startswith(_UNUSED):
        return None
    table = _LANGUAGE if model == "language" else _CLASSIFIER
    (prefix,) = [prefix for prefix in table if name.startswith(prefix)]
    return (table[prefix] + name.removeprefix(prefix)).replace(".function.", ".f.")
