"""What training will need, from the model's config alone: `python ipo.py plan --model M --gpus 8 --gpu-memory 80`."""
import model as lm_code


def memory(lm, gpus, micro_tokens, dtype, checkpointed, lora_rank=0, device="cuda"):
    """What one rank will hold at its fullest, in bytes by kind. lm: a model on the meta device (`ipo.skeleton`).

    Returns (parameters, trained parameters, {kind: bytes}, arithmetic operations a token). Activations are what a
    Llama block keeps for its backward pass; the frameworks' own memory, about 1 GB on a GPU, is not in it.
    """
    c, size, layers = lm.config, dtype.itemsize, lm.get_decoder().layers
    total, trained, blocks, vocabulary = (sum(p.numel() for p in ps) for ps in (
        lm.parameters(), [p for p in lm.parameters() if p.requires_grad], layers.parameters(),
        lm.get_input_embeddings().parameters()))
    chunk, keep = lm_code.head_chunk(device, c.vocab_size)
    scored = micro_tokens // 2                                                # CHOICE: half of the tokens are suffixes
    kv = c.num_key_value_heads * getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    kept = size * (9 * c.hidden_size + 4 * kv + 4 * c.intermediate_size) + 8 * c.hidden_size * (size < 4)
    kept = size * c.hidden_size * len(layers) + kept if checkpointed else kept * len(layers)
    unsharded = vocabulary * 4 if gpus == 1 else (size + 4) * (total - blocks)
    return total, trained, {
        "weights": (4 * trained + (total - trained) * size) / gpus,
        "gathered": size * (total - blocks + 2 * blocks / len(layers)) if gpus > 1 else size * trained * (size < 4),
        "gradients": 4 * trained / gpus + unsharded * (not lora_rank),
        "optimizer": 8 * trained / gpus,
        "activations": micro_tokens * (kept + 2 * size * c.intermediate_size),
        "logits": 8 * c.vocab_size * min(chunk, scored) + 4 * min(keep, scored * c.vocab_size),
    }, (4 if lora_rank else 6) * (total - vocabulary * (not c.tie_word_embeddings))


def add_flags(p):
    """The flags of the stage `plan` alone (`argparse`)."""
    p.add_argument("--gpus", type=int, default=1, help="ranks")
    p.add_argument("--gpu-memory", type=float, default=80, help="GB of each")
    p.add_argument("--tflops", type=float, default=989, help="peak of each in the compute dtype (H100: 989)")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")


def show(args, lm, dtype):
    """Print the table of the stage `plan`, and whether it fits."""
    total, trained, kinds, operations = memory(lm, args.gpus, args.micro_tokens, dtype, args.checkpoint_activations,
                                               args.lora_rank)
    print(f"{args.model}: {total / 1e9:.3f} B parameters, {trained / 1e9:.3f} B trained, {args.gpus} GPU(s)")
    for kind, size in {**kinds, "together": sum(kinds.values())}.items():
        print(f"  {kind:12}{size / 1e9:8.2f} GB a rank")
    fits = sum(kinds.values()) < 0.92 * args.gpu_memory * 1e9  # CHOICE: 8 % for kernels and fragmentation
    speed = args.gpus * args.tflops * 1e12 * args.mfu / operations
    print(f"  {'fits' if fits else 'does NOT fit'} in {args.gpu_memory:g} GB; about {speed:,.0f} tokens/s")
