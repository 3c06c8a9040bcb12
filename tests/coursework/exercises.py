"""The exercises: which function bodies are taken out, and what their pages of the handout say
beside what the sources say themselves. mistakes.py has the known wrong bodies.

To add one: an entry here, a test file of that number and slug that needs no other exercise
(`stand_ins`, where it has one, is what its tests run in), and two mistakes at least."""

from dataclasses import dataclass

SECONDS = 10.0  # for the tests of one exercise


@dataclass(frozen=True)
class Exercise:
    number: int
    slug: str
    title: str
    points: int
    file: str
    functions: tuple[str, ...]
    paper: str  # where it stands there
    shapes: str
    text: str
    hints: tuple[str, ...]  # what everyone gets wrong

    @property
    def page(self) -> str:
        return f"{self.number:02}-{self.slug}.md"

    @property
    def tests(self) -> str:
        return f"test_exercise_{self.number:02}_{self.slug}.py"

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")


EXERCISES = (
    Exercise(
        1, "advantages", "group advantages", 6, "grpo.py", ("group_advantages",),
        "R1 2.2.1, Eq. 3",
        "rewards_PG: P questions by G outputs of each; so is the result.",
        """
A question is asked G times, and an output is as good as its reward is better than its group's
mean, in units of the group's standard deviation. There is no second network to say what was to be
expected: the group does. `normalize_std=False` is Dr. GRPO's variant, which only subtracts the
mean.
""",
        (
            "The mean and the std are those of the group, not of the batch.",
            "The paper doesn't say which std: here it is the population's (ddof 0); torch's default"
            " is the other one.",
            "Where a group agrees, its std is 0: the advantages are 0, not NaN. Rounding (0.1 + 0.2"
            " and 0.3) is no disagreement.",
            "Nothing is added to the std: close rewards are as far apart as distant ones, in units"
            " of their std.",
            "A process may have no questions at all: P = 0.",
        ),
    ),
    Exercise(
        2, "kl", "the KL estimate", 6, "grpo.py", ("kl_estimate",),
        "R1 2.2.1, Eq. 2",
        "Two tensors of log-probabilities of the same shape, any; so is the result.",
        """
How far the policy has gone from the reference is an expectation over what the policy writes, and
only the tokens it did write are at hand. This estimate of it (k3) has the right mean, and no
token has a negative one. With x = pi_ref / pi it is x - 1 - log x: the mean of x - 1 is 0, and it
removes the noise of -log x.
""",
        (
            "log(pi / pi_ref) by itself (k1) has the same mean, but its gradient as a loss does not"
            " depend on the reference.",
            "The ratio is pi_ref / pi. The other way round the formula estimates another thing.",
            "Half the squared log-ratio (k2) is close where the two agree, and biased elsewhere.",
            "Nothing is detached: as a loss it needs its gradient.",
        ),
    ),
    Exercise(
        3, "loss", "the clipped loss", 12, "grpo.py", ("importance_ratio", "grpo_loss"),
        "R1 2.2.1, Eq. 1",
        "N tokens of all outputs, end to end: logprobs_N, old_N, ref_N (or None), advantages_N,"
        " weights_N, and output_N, which output each is of. The loss and the two sums in `stats`"
        " (clip_fraction, kl) are single numbers.",
        """
The objective of GRPO, as a loss: minus the weighted sum over tokens of what the clip leaves of
the gain, less beta times the KL (of `kl_estimate`, exercise 2, which the tests give).
`importance_ratio` is pi / pi_old of each token or, at level "sequence", of the whole output,
which is the product over its tokens; another level raises ValueError. `eps_high` is the upper
bound where it is given; `stats["clip_fraction"]` counts the tokens whose gain the clip has made
smaller. Without a reference the KL is 0. What the min leaves of the gain:

```
eps = 0.2      rho = 0.5   rho = 2
A =  1            0.5        1.2
A = -1           -0.8       -2
```
""",
        (
            "The min, not the max, for A < 0 too: see the table.",
            "Clipping alone, without the min, would take the gradient away from moves the wrong"
            " way as well.",
            "pi / pi_old: the log-probs stored when the tokens were drawn go below.",
            "The ratio is 1 on the first update and not detached: its gradient is what teaches.",
            "The KL is subtracted from the objective, hence added to the loss.",
            "The sum is weighted, the KL as well; nothing is averaged over the N tokens here.",
        ),
    ),
    Exercise(
        4, "weights", "what each token counts", 6, "grpo.py", ("token_weights",),
        "R1 2.2.1; DeepSeekMath Eq. 3; DAPO Eq. 8; Dr. GRPO",
        "lengths_O: tokens of each of O outputs; the result, O: what each token of that output"
        " counts.",
        """
The mean over outputs of the mean over their tokens, the mean over all tokens, and the sum over a
constant are three different objectives. The loss of exercise 3 is a weighted sum over tokens; the
weights say which mean it is. A batch is trained on in parts (micro-batches, processes), and the
losses of its parts have to add up to its own: the weights are made from `outputs`, `tokens` and
`longest`, which describe the whole batch. Another aggregation raises ValueError.
""",
        (
            "Averaging over the batch's tokens is not the paper's formula: long outputs win.",
            "len(lengths_O) counts the outputs of this part; `outputs` those of the batch. With the"
            " first, a batch cut into 8 parts has another gradient than in one.",
            "`longest` is the longest output allowed, not the longest one of these.",
            "`outputs` and `tokens` may be 0, where a batch is empty.",
        ),
    ),
    Exercise(
        5, "rope", "rotary positions", 8, "model.py", ("rotate",),
        "V3 2.1.1 (RoPE); RoFormer, 2104.09864",
        "x_BTHR: B rows, T positions, H heads, R dimensions; rows.turn_BTr: of each position and of"
        " each of the r = R/2 pairs of dimensions e^(i angle). The result is as x, dtype included.",
        """
Each pair of dimensions is a point in the plane, and turns by an angle that is the position times
the pair's frequency: then the product of a query and a key depends on how far apart they are, and
not on where. `rows.turn_BTr` holds cos(angle) + i sin(angle); multiply in at least fp32 (`full`
gives that). `interleaved` says which dimensions are a pair.
""",
        (
            "DeepSeek's pairs are neighbours. Rotating halves without permuting is wrong, and"
            " nothing fails but the numbers.",
            "The result has the layout of x: each pair goes back to where it was.",
            "All heads of a position turn alike; rows are at positions of their own.",
            "bf16 goes in and bf16 comes out; in between it is fp32 at least, or each product is"
            " rounded.",
        ),
    ),
    Exercise(
        6, "absorbed", "absorbed attention of MLA", 10, "model.py", ("MLA.absorbed",),
        "V3 2.1.1, Eq. 1-10",
        "One new token a row (T = 1): q_BTHK and the rotated q_BTHR; cache_ZYX: pages of entries of"
        " X = C + R numbers, the latent and then the rotated key that all heads share. The result:"
        " B, 1, H*U, heads one after another, before o_proj.",
        """
MLA caches one latent vector c of C numbers for each token, from which every head's key and value
are linear maps. Building them again for all cached tokens at every step would be slow; but W_UK
can be applied to the query instead, once, and W_UV to the mixture of latents.
`kernels.mla_decode(q_BHX, cache_ZYX, rows.table_BP, rows.seen_B, C, scale)` returns that mixture,
BHC: its keys are whole entries of the cache, and its values their first C numbers. The maps are
in `self.kv_b_proj.weight`: for each head K rows of W_UK, then U rows of W_UV.
""",
        (
            "The scale counts all K + R dimensions (192, not 128), and YaRN's temperature squared"
            " belongs on it: self.scale has both.",
            "The rotated part takes part in the scores: an entry is [latent; rotated key].",
            "The rows of kv_b_proj are ordered head by head, not all W_UK and then all W_UV.",
            "The heads' outputs stand one after another for each row.",
            "Building keys and values again gives the same numbers, and no points:"
            " kernels.mla_decode is called once, for all rows and heads.",
        ),
    ),
    Exercise(
        7, "router", "the router", 10, "model.py", ("Gate.forward", "Gate.select"),
        "V3 2.1.2, Eq. 13-16",
        "x_BTD: the tokens; route_BTA: experts to use, -1 where the router chooses, or None. The"
        " result: Routing(weights_BTA, experts_BTA, scores_BTE). `select`: biased_BTE -> BTA.",
        """
Each token goes to the A best of E experts by score plus bias, and what they return is weighed by
their scores without the bias: the bias evens the load and must not touch the output. Experts are
in `n_group` groups, of which a token may use the `topk_group` best; a group is as good as the sum
of its two best biased scores. The weights are the selected scores divided by their sum (if
`norm_topk_prob`), times `routed_scaling_factor`.
""",
        (
            "Weighting by the biased score: the bias is for the selection only.",
            "Losing the bias altogether, which no test with a bias of zero sees.",
            "Losing groups are masked with -inf: with 0, a loser beats a winner whose biased score"
            " is negative.",
            "A group's score is the sum of its two best: not its best, and not all of them.",
            "Sigmoid, not softmax.",
            "A given route replaces the choice, and not the weights' formula.",
        ),
    ),
    Exercise(
        8, "cache", "a step with the cache", 10, "model.py",
        ("MLA.forward", "Transformer.cached_rows"),
        "V3 2.1.1 (what is cached)",
        "cached_rows: positions_BT of the new tokens, Y tokens a page, table_BP (the pages of each"
        " row, in order; None: row b is page b) -> Rows. MLA.forward: x_BTD -> BTD; cache_ZYX:"
        " pages of entries of X = C + R numbers.",
        """
`cached_rows` says where each new token stands: in which page, at which place in it, how its pairs
turn (`self.turn`), and, for a step of one token a row, how many tokens it sees; with more tokens
(a prefill, which starts at position 0) seen_B is None. `MLA.forward` projects (`self.project`),
writes the entries [latent; rotated key] into the cache, and then attends: in a step by
`self.absorbed` over the cache, otherwise by `self.naive` over what was just projected, with
rows.starts_BT; and `self.o_proj` last. Without a cache (None) nothing is written.
""",
        (
            "A token sees itself: it sees one more than its position.",
            "The entry is written before it is read.",
            "Angles go by the position in the text, not by the place in the page.",
            "Rows have lengths of their own: a step is at another position in each.",
            "Documents that lie in one row don't see each other.",
        ),
    ),
    Exercise(
        9, "top_p", "drawing with top-p", 8, "sample.py", ("choose",),
        "R1 3 (T = 0.6, top-p 0.95)",
        "logits_BV: a row for each of B outputs; uniform_B: a number in [0, 1) for each. The"
        " result: tokens_B and their log-probabilities, B.",
        """
The logits are divided by the temperature; then, if top_p < 1, the fewest tokens that together
reach top_p are kept, the likeliest first, and renormalised; then a token is drawn: the first, in
the order of the vocabulary, whose cumulative probability exceeds the uniform number. The
log-probability is that under the distribution which was drawn from. Temperature 0 takes the best
token, and its log-probability is 0.
""",
        (
            "The token that crosses top_p is kept; without it the rest falls short of top_p.",
            "One token at least is kept, though it has more than top_p by itself.",
            "A trainer needs the log-prob of what was drawn from: after temperature and filter.",
            "The filter is found in sorted order and applied in that of the vocabulary.",
            "The temperature comes first.",
        ),
    ),
    Exercise(
        10, "format", "the format reward", 5, "rewards.py", ("format_reward",),
        "R1 2.2.2",
        "A response -> 1.0 or 0.0.",
        r"""
Is the response laid out as R1-Zero's template asks? Exactly one reasoning and one answer, each
with something visible in it, and nothing but white space outside. `tags=False`: for chat
templates, without the answer's tags, where the answer is all that follows the reasoning.
""",
        (
            "Thousands of outputs look for the weak spot: what is ambiguous earns 0.",
            "Doubled tags: `.*` in a regular expression matches tags as well.",
            "Empty reasoning, or reasoning of one zero-width space.",
            "Text before, between and after.",
        ),
    ),
    Exercise(
        11, "accuracy", "the accuracy reward", 7, "rewards.py",
        ("extract_answer", "accuracy_reward"),
        "R1 2.2.2",
        "extract_answer: a response -> its answer's text, or None. accuracy_reward: 1.0 or 0.0.",
        r"""
The final answer is the last `<answer>...</answer>` or `\boxed{...}` after the reasoning; a box
within the answer's tags is the answer, if it is the only one there. `split_reasoning(response)`
gives the text after the reasoning, or None where the reasoning has no clear end; `last_box(text)`
the content of the last box, or None where that is malformed; `BOX` and `ANSWER_TAG` find boxes
and tags. Whatever is not clear is None. The reward is what `check(offered(response, check), gold)`
says: `offered` is your `extract_answer`, but for programs.
""",
        (
            "The answer is not taken from the reasoning, however right it is there.",
            "Where the last answer is malformed, an earlier one does not take its place.",
            "`gold in response` and `answer.startswith(gold)` pay for listing everything.",
            "Unclosed, doubled or nested tags have no answer; nor have two boxes.",
            "An empty answer is None.",
        ),
    ),
    Exercise(
        12, "flash", "flash attention, forward", 8, "tests/coursework/flash.py",
        ("flash_attention",),
        "beyond R1: FlashAttention, 2205.14135",
        "q_TK, k_TK, v_TU: one head, one document -> out_TU, and lse_T, the log (base e) of each"
        " query's sum of exponentials.",
        """
The softmax needs a whole row of scores, and T x T numbers of them don't fit. So `tile` keys at a
time pass by, and each query carries the maximum m of its scores so far, the sum l of exponentials
and the weighted sum O of values, both relative to m: where m grows, l and O shrink. This is what
the Triton kernel of kernels/attention.py does; here it is a loop in plain torch, and causal.
""",
        (
            "What was summed with a smaller maximum shrinks, the sum as well as the values.",
            "Without the maximum, scores of 1000 overflow.",
            "No sum, maximum or product goes over more than `tile` keys: a query's whole row of"
            " scores is never there.",
            "A query sees itself and what stands before it, in every tile; the last tile may be"
            " short.",
            "lse contains the maximum.",
        ),
    ),
    Exercise(
        13, "majority", "the majority vote", 4, "rewards.py", ("majority",),
        "R1 3 (cons@64)",
        "A list of answers, some of them None -> the answer that wins, or None.",
        """
cons@k: the answers of k outputs vote, and equal ones (under `check`) vote together. The first
answer of the largest group is returned; of groups that are equally large, the one that came
first. None and blank answers do not vote.
""",
        (
            "None is no answer: most outputs without one do not make a majority.",
            "1/2 and 0.5 are one answer.",
            "Ties go to the earliest: a rule, or the measure is another at each run.",
        ),
    ),
)  # fmt: skip
