"""Log-probabilities of tokens straight from hidden states, without the (N, V) logits."""
import torch


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

    hidden (N, H), weight (V, H), targets (N,) -> float32 (N,), nats. Forward keeps log Z of each
    token; backward computes a chunk's logits again, turns them in place into d/dlogits = onehot -
    softmax, and sums the weight's gradient in float32. Memory does not grow with N times V: logits
    exist for `chunk` tokens at a time, and only the first chunks, up to `keep` logits together,
    are kept for backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, keep=0):
        """Logits minus log Z, at the targets."""
        logps = []
        log_z = []
        kept = []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ weight.T).float()  # (chunk, V)
            at_target = logits.gather(-1, t[:, None])[:, 0]
            log_z.append(logits.logsumexp(-1))
            logps.append(at_target - log_z[-1])
            keep -= logits.numel()
            if keep >= 0:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_z))
        ctx.chunk = chunk
        ctx.kept = kept
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of hidden and, unless it is frozen, of weight."""
        hidden, weight, targets, log_z = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        chunks = [x.split(ctx.chunk) for x in (grad_hidden, hidden, targets, log_z, grad)]
        for out, h, t, z, g in zip(*chunks):
            if ctx.kept:
                d = ctx.kept.pop(0)  # logits (chunk, V)
            else:
                d = (h @ weight.T).float()
            d.sub_(z[:, None]).exp_().mul_(-g[:, None])  # -g * softmax
            d.scatter_add_(1, t[:, None], g[:, None])    # g * (onehot - softmax)
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
        return grad_hidden, grad_weight, None, None, None
