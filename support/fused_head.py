"""From hidden states to logits, and to log-probabilities of tokens without the (N, V) logits."""
import torch


def logit_shape(config, temperature=1.0):
    """What a model does to its output layer's numbers x: logits = cap * tanh(scale * x / cap).

    Returns (scale, cap) of logits / temperature; cap is None where logits = scale * x. Each family
    has its own word for it.
    """
    scale = getattr(config, "logit_scale", None) or 1.0          # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0      # Granite
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    cap = getattr(config, "final_logit_softcapping", None)       # Gemma 2
    if cap is not None:
        cap /= temperature
    return scale / temperature, cap


def shaped(logits, scale, cap):
    """Scale and cap logits (see `logit_shape`) in place."""
    if scale != 1:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits


def output_logits(model, hidden):
    """Hidden states (..., H) -> logits (..., V), as the model's own `forward` computes them.

    The one place outside `TokenLogps` that applies the output layer; without gradients.
    """
    logits = model.get_output_embeddings()(hidden)
    return shaped(logits, *logit_shape(model.config))


def chunk_sizes(device_type, vocabulary):
    """How many logits may exist at once, and how many may wait for the backward pass.

    Returns (tokens per chunk, logits to keep) for a kind of device ("cpu", "cuda", ...).
    """
    if device_type == "cpu":
        # 64 MiB a chunk: glibc returns blocks over 32 MiB to the system as soon as they are freed.
        return max(1, 2 ** 24 // vocabulary), 2 ** 26
    return max(1, 2 ** 27 // vocabulary), 0


class TokenLogps(torch.autograd.Function):
    """Log-probabilities of tokens under `softmax(hidden @ weight.T)`, logits a chunk at a time.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) -> float32 (N,), nats; for scale
    and cap see `logit_shape`. Forward keeps log Z of each token; backward computes a chunk's logits
    again, turns them in place into d/dlogits = onehot - softmax, and sums the weight's gradient in
    float32. Memory does not grow with N times V: logits exist for `chunk` tokens at a time, and
    only the first chunks, up to `keep` logits together, are kept for backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk, keep=0, scale=1.0, cap=None):
        """Logits minus log Z, at the targets."""
        logps = []
        log_z = []
        kept = []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = _chunk_logits(h, weight, bias, scale, cap)
            at_target = logits.gather(-1, t[:, None])[:, 0]
            log_z.append(logits.logsumexp(-1))
            logps.append(at_target - log_z[-1])
            keep -= logits.numel()
            if keep >= 0:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(log_z))
        ctx.chunk = chunk
        ctx.shape = (scale, cap)
        ctx.kept = kept
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of hidden and, unless they are frozen, of weight and bias."""
        hidden, weight, bias, targets, log_z = ctx.saved_tensors
        scale, cap = ctx.shape
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        chunks = [x.split(ctx.chunk) for x in (grad_hidden, hidden, targets, log_z, grad)]
        for out, h, t, z, g in zip(*chunks):
            if ctx.kept:
                d = ctx.kept.pop(0)  # logits (chunk, V)
            else:
                d = _chunk_logits(h, weight, bias, scale, cap)
            if cap is not None:
                slope = 1 - (d / cap) ** 2  # of cap * tanh(x / cap)
            d.sub_(z[:, None]).exp_().mul_(-g[:, None])  # -g * softmax
            d.scatter_add_(1, t[:, None], g[:, None])    # g * (onehot - softmax)
            if cap is not None:
                d.mul_(slope)
            if scale != 1:
                d.mul_(scale)
            if grad_bias is not None:
                grad_bias.add_(d.sum(0))
            d = d.to(weight.dtype)
            out.copy_(d @ weight)
            if grad_weight is None:
                continue
            if d.dtype == torch.float32:
                grad_weight.addmm_(d.T, h)
            else:
                grad_weight.add_(d.T @ h)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _chunk_logits(hidden, weight, bias, scale, cap):
    """Logits float32 (chunk, V) of some hidden states (chunk, H)."""
    logits = (hidden @ weight.T).float()
    if bias is not None:
        logits.add_(bias)
    return shaped(logits, scale, cap)
