"""Why a method does worse in the table of methods than its paper says: by recipe, as measured."""

NOTES = {
    "awq,w4:solver=rtn": (
        "gains nothing over `w4:solver=rtn`: the searched range weighs errors by the diagonal of "
        "XᵀX, which spares loud inputs already, and the demo model has none (alpha is 0 at 15 of "
        "its 24 edges, no edge gains more than 2 percent). On the paper's own range, the rows with "
        "`clip=absmax,symmetric=false`, the layer's loss falls by 29 percent (n = 512)."
    ),
    "awq,w2": (
        "is `w2`: with the searched range no scale helps a 2-bit grid on the layer, so 1 is kept. "
        "Others' 2-bit models break where 1 is not among the candidates."
    ),
    "smooth,w4": (
        "moves what is loud from inputs, which stay exact here, into weights, which are rounded. "
        "It is made for `w8a8`; `awq` chooses how much to move by what the weights lose."
    ),
    "smooth,w8a8": (
        "gains little on the demo model, whose inputs have no loud channel; on the layer, which has"
        " one, it takes 9 tenths of the loss away."
    ),
    "w2:clip=learned": (
        "is trained for 64 steps (4 epochs of 16 windows), where OmniQuant takes 40 epochs of 128, "
        "and for round-to-nearest, while the sweep behind it compensates; the searched range of "
        "`w2` weighs errors by what the sweep will see."
    ),
    "squeezellm": (
        "holds 16 levels of 16 bits for each row: 0.33 to 1 bit per weight on rows of 768 and 256 "
        "weights, as the demo model has them, and 0.06 on rows of 4096."
    ),
    "spqr:bits=2": (
        "stops at the limit of 3 percent: with 2 bits most weights cost more than the threshold of "
        "0.2 that the paper gives for 3 and 4 bits."
    ),
    "ternary, binary": (
        "are grids that models are trained on; weights that were trained without them are only "
        "rounded here."
    ),
    "w4,lorc": (
        "gives little back: what rounding loses is nearly white, and 8 directions of matrices this "
        "small cost 0.3 to 0.5 bits per weight, which a finer grid uses better."
    ),
    "olive, w4,a4": (
        "lose by the 4 bits of inputs: `olive:act_bits=none` has less than half of the layer's "
        "loss (0.012 of 0.028 at n = 512)."
    ),
    "kivi, kvquant": (
        "are read in windows of 512 tokens, of which kivi keeps the newest 128 as they are."
    ),
}
"""Recipes to what was found."""
