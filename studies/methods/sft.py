"""SFT on the chosen sides of the intervened pairs."""
from studies.lab import method


@method("SFT on chosen", "arXiv 2509.24393, ablation",
        "42.3% harmful reasoning, where IPO has 10.9%")
def sft(lab):
    """The pairs of IPO without their rejected sides."""
    return lab.sft(lab.pairs())
