"""Known mistakes, each a wrong body: what implementations of this method were seen to get wrong.
The grader attaches the hint where the same tests fail with the same numbers as with the mistake;
tests/test_coursework.py puts each into the source and sees it lose its exercise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    exercise: int
    name: str
    function: str
    edits: tuple[tuple[str, str], ...]  # (what stands in the body once, what is there instead)
    caught_by: str
    hint: str


def whole(body: str) -> tuple[tuple[str, str], ...]:
    """A body that has nothing of the right one."""
    return (("", body),)


MISTAKES = (
    Mistake(
        1, "NaN where a group agrees", "group_advantages",
        (("torch.where(agreed_P1, 0.0, centred_PG / std_P1.where(~agreed_P1, 1.0))",
          "centred_PG / std_P1"),),
        "test_a_group_that_agrees_has_advantages_of_0",
        "a group that agrees has a std of 0, and 0 / 0 is NaN",
    ),
    Mistake(
        1, "ddof 1", "group_advantages", (("correction=0", "correction=1"),),
        "test_the_std_is_the_populations",
        "std is the population's: torch's default divides by G - 1",
    ),
    Mistake(
        1, "something added to the std", "group_advantages",
        (("std_P1.where(~agreed_P1, 1.0)", "(std_P1.where(~agreed_P1, 1.0) + 1e-6)"),),
        "test_nothing_is_added_to_the_std",
        "an epsilon beside the std makes close rewards count less; treat a std of 0 by itself",
    ),
    Mistake(
        1, "advantages over the batch", "group_advantages",
        (("rewards_PG.mean(1, keepdim=True)", "rewards_PG.mean()"),
         ("rewards_PG.std(1, keepdim=True, correction=0)",
          "rewards_PG.std(correction=0).expand(len(rewards_PG), 1)")),
        "test_each_group_is_compared_with_its_own_mean_and_std",
        "the mean and the std are each group's own, not the batch's",
    ),
    Mistake(
        2, "k1", "kl_estimate", (("log_ratio.exp() - log_ratio - 1", "-log_ratio"),),
        "test_it_is_never_negative",
        "log(pi / pi_ref) is k1: negative for some tokens, and its gradient ignores the reference",
    ),
    Mistake(
        2, "pi / pi_ref", "kl_estimate",
        (("ref_logprobs - logprobs", "logprobs - ref_logprobs"),),
        "test_it_is_largest_where_the_reference_finds_a_token_likelier",
        "the ratio is pi_ref / pi, not pi / pi_ref",
    ),
    Mistake(
        2, "k2", "kl_estimate", (("log_ratio.exp() - log_ratio - 1", "log_ratio**2 / 2"),),
        "test_the_expectation_is_the_exact_kl",
        "half the square of the log-ratio is k2: its mean is not the KL",
    ),
    Mistake(
        2, "detached", "kl_estimate",
        (("log_ratio.exp() - log_ratio", "log_ratio.exp().detach() - log_ratio"),),
        "test_the_gradient_is_1_minus_the_ratio",
        "as a loss it needs the gradient of both terms: nothing is detached",
    ),
    Mistake(
        3, "the mean over the tokens", "grpo_loss",
        (("-(weights_N * (gain_N - beta * kl_N)).sum()",
          "-(gain_N - beta * kl_N).mean()"),),
        "test_each_token_counts_by_its_weight",
        "the weights say which mean it is: multiply by them and add up",
    ),
    Mistake(
        3, "old / new", "importance_ratio", (("logprobs_N - old_N", "old_N - logprobs_N"),),
        "test_the_ratio_is_new_over_old", "the ratio is pi / pi_old, not pi_old / pi",
    ),
    Mistake(
        3, "the KL with the wrong sign", "grpo_loss",
        (("gain_N - beta * kl_N", "gain_N + beta * kl_N"),),
        "test_the_kl_adds_to_the_loss",
        "the objective is the gain minus beta KL, and the loss is minus the objective",
    ),
    Mistake(
        3, "clipped without the min", "grpo_loss",
        (("torch.min(rho_N * advantages_N, clipped_N * advantages_N)",
          "clipped_N * advantages_N"),),
        "test_the_min_is_taken_where_the_advantage_is_positive",
        "without the min, a move the wrong way is clipped as well and never pushed back",
    ),
    Mistake(
        3, "max for A < 0", "grpo_loss",
        (("torch.min(rho_N * advantages_N, clipped_N * advantages_N)",
          "torch.min(rho_N, clipped_N) * advantages_N"),),
        "test_the_min_is_taken_where_the_advantage_is_negative",
        "the min is of the products with A: for A < 0, min(rho, clip) A is their max",
    ),
    Mistake(
        3, "the KL without its weights", "grpo_loss",
        (("-(weights_N * (gain_N - beta * kl_N)).sum()",
          "-(weights_N * gain_N).sum() + beta * kl_N.sum()"),),
        "test_the_kl_counts_by_the_weights_too",
        "a token's KL has the token's weight, as its gain has",
    ),
    Mistake(
        3, "the KL detached", "grpo_loss",
        (("kl_estimate(logprobs_N, ref_N)", "kl_estimate(logprobs_N, ref_N).detach()"),),
        "test_the_kl_has_its_gradient",
        "the KL pulls back by its gradient: it is part of the loss, and not only a number to watch",
    ),
    Mistake(
        3, "the reference for the policy", "grpo_loss",
        (("kl_estimate(logprobs_N, ref_N)", "kl_estimate(ref_N, logprobs_N)"),),
        "test_the_kl_is_of_the_policy_against_the_reference",
        "kl_estimate takes the policy's log-probs first, and then the reference's",
    ),
    Mistake(
        3, "against the policy that drew", "grpo_loss",
        (("kl_estimate(logprobs_N, ref_N)", "kl_estimate(logprobs_N, old_N)"),),
        "test_the_kl_is_of_the_policy_against_the_reference",
        "the KL is against the reference; the policy that drew the tokens is in the ratio",
    ),
    Mistake(
        3, "always the tokens' ratios", "grpo_loss",
        (("output_N, ratio)", 'output_N, "token")'),),
        "test_the_loss_takes_the_ratio_that_it_is_told",
        "`ratio` says whose ratio it is, the token's or the output's: hand it to importance_ratio",
    ),
    Mistake(
        4, "the mean over the batch's tokens", "token_weights",
        (("1 / (outputs * lengths_O)", "torch.full_like(lengths_O, 1 / max(1, tokens))"),),
        "test_with_output_the_mean_over_outputs_comes_out",
        "each output's mean over its own tokens counts the same: 1 / G 1 / |o|",
    ),
    Mistake(
        4, "the longest of these", "token_weights",
        (("outputs * longest", "outputs * int(max(lengths_O, default=0))"),),
        "test_constant_divides_by_the_longest_output_allowed",
        "`longest` is the longest output allowed, a constant",
    ),
    Mistake(
        4, "this part's outputs", "token_weights",
        (("1 / (outputs * lengths_O)", "1 / (max(1, len(lengths_O)) * lengths_O)"),),
        "test_a_part_of_the_batch_has_the_weights_of_the_whole",
        "G is `outputs`, of the whole batch: the gradient must not depend on how it is cut",
    ),
    Mistake(
        5, "turned backwards", "rotate",
        (("rows.turn_BTr.unsqueeze(2)", "rows.turn_BTr.conj().unsqueeze(2)"),),
        "test_it_turns_forward", "(x, y) becomes (x cos a - y sin a, x sin a + y cos a)",
    ),
    Mistake(
        5, "halves for neighbours", "rotate", (("if interleaved:", "if not interleaved:"),),
        "test_qwens_pairs_are_half_the_dimensions_apart",
        "DeepSeek's pairs are neighbours, (0, 1), (2, 3); Qwen's are R/2 apart",
    ),
    Mistake(
        5, "the halves left apart", "rotate",
        (("torch.view_as_real(pairs_BTHr * turn_BT1r).flatten(-2)",
          "torch.cat(((pairs_BTHr * turn_BT1r).real, (pairs_BTHr * turn_BT1r).imag), -1)"),),
        "test_deepseeks_pairs_are_neighbours",
        "the pairs are neighbours in the result as well: put each number back to its place",
    ),
    Mistake(
        5, "in the input's dtype", "rotate",
        whole("""    turn_BT1r = rows.turn_BTr.unsqueeze(2)
    c, s = turn_BT1r.real.to(x_BTHR.dtype), turn_BT1r.imag.to(x_BTHR.dtype)
    x, y = x_BTHR.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x_BTHR.chunk(2, -1)
    turned = x * c - y * s, x * s + y * c
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)"""),
        "test_bf16_is_rounded_once_at_the_end",
        "multiply in fp32 at least, and round to the input's dtype at the end",
    ),
    Mistake(
        6, "the naive form", "MLA.absorbed",
        whole("""        out = []
        for b, seen in enumerate(rows.seen_B.tolist()):
            pages = [b] if rows.table_BP is None else rows.table_BP[b]
            entries_SX = torch.cat([cache_ZYX[page] for page in pages])[:seen]
            kv = self.kv_b_proj(entries_SX[:, : self.C]).view(seen, self.H, -1)
            k_SHK, v_SHU = kv.split((self.K, self.U), -1)
            scores_HS = torch.einsum("hk,shk->hs", q_BTHK[b, 0], k_SHK)
            scores_HS = scores_HS + q_BTHR[b, 0] @ entries_SX[:, self.C :].T
            probs_HS = (self.scale * scores_HS).softmax(-1)
            out.append(torch.einsum("hs,shu->hu", probs_HS, v_SHU).flatten())
        return torch.stack(out)[:, None]"""),
        "test_one_call_of_the_kernel_mixes_the_latents",
        "keys and values of all cached tokens are not built again: move W_UK to the query and W_UV"
        " to the mixture, and let kernels.mla_decode read the latents",
    ),
    Mistake(
        6, "the scale of K dimensions", "MLA.absorbed",
        (("self.C, self.scale", "self.C, self.K**-0.5"),),
        "test_the_scale_counts_all_dimensions",
        "the scores are scaled by all K + R dimensions, 192 and not 128: self.scale",
    ),
    Mistake(
        6, "without the rotated part", "MLA.absorbed",
        (("q_BTHR[:, 0]), -1)", "0 * q_BTHR[:, 0]), -1)"),),
        "test_it_equals_attention_over_each_heads_own_keys_and_values",
        "compare the rotated part of the scores, and the order of kv_b_proj's rows",
    ),
    Mistake(
        6, "rows and heads mixed up", "MLA.absorbed",
        (("out_HBU.transpose(0, 1).flatten(1).unsqueeze(1)",
          "out_HBU.reshape(len(mixed_BHC), 1, -1)"),),
        "test_rows_and_heads_stay_apart",
        "transpose heads and rows before they are laid out: reshape alone mixes them",
    ),
    Mistake(
        6, "without mscale", "MLA.absorbed",
        (("self.C, self.scale", "self.C, (self.K + self.R) ** -0.5"),),
        "test_the_scale_has_yarns_temperature",
        "YaRN's temperature squared is part of the scale: self.scale has it",
    ),
    Mistake(
        7, "softmax", "Gate.forward", ((".sigmoid()", ".softmax(-1)"),),
        "test_the_scores_are_sigmoids", "each score is a sigmoid by itself, not a softmax",
    ),
    Mistake(
        7, "biased scores as weights", "Gate.forward",
        (("scores_BTE.gather(-1, experts_BTA)",
          "(scores_BTE + self.e_score_correction_bias).gather(-1, experts_BTA)"),),
        "test_the_bias_is_not_in_the_weights",
        "the bias takes part in the selection only: the weights are of the scores",
    ),
    Mistake(
        7, "no bias in the selection", "Gate.forward",
        (("scores_BTE.detach() + self.e_score_correction_bias", "scores_BTE.detach()"),),
        "test_the_bias_takes_part_in_the_selection", "select by score plus bias",
    ),
    Mistake(
        7, "losers at 0", "Gate.select", (('float("-inf")', "0.0"),),
        "test_an_expert_of_a_losing_group_never_wins",
        "mask losing groups with -inf: 0 beats a negative biased score",
    ),
    Mistake(
        7, "a group by its best", "Gate.select",
        (("grouped_BTge.topk(best, -1).values.sum(-1)", "grouped_BTge.amax(-1)"),),
        "test_a_group_is_as_good_as_its_two_best", "a group's score is the sum of its two best",
    ),
    Mistake(
        7, "a group by all of its experts", "Gate.select",
        (("grouped_BTge.topk(best, -1).values.sum(-1)", "grouped_BTge.sum(-1)"),),
        "test_in_a_larger_group_only_its_two_best_count",
        "a group's score is the sum of its two best, and not of all",
    ),
    Mistake(
        7, "the best group alone", "Gate.select", (("config.topk_group, -1", "1, -1"),),
        "test_a_token_may_use_as_many_groups_as_topk_group_says",
        "a token may use `topk_group` groups, and not only the best",
    ),
    Mistake(
        7, "all groups", "Gate.select", (("if config.n_group > 1:", "if False:"),),
        "test_a_token_may_use_as_many_groups_as_topk_group_says",
        "the experts of all but the `topk_group` best groups are out",
    ),
    Mistake(
        8, "a token does not see itself", "Transformer.cached_rows",
        (("positions_BT[:, 0] + 1 if", "positions_BT[:, 0].clamp(min=1) if"),),
        "test_a_new_token_sees_itself", "a token at position t sees t + 1 tokens, itself included",
    ),
    Mistake(
        8, "the rotated key first", "MLA.forward",
        (("torch.cat((latent_BTC, rope_BTR), -1)", "torch.cat((rope_BTR, latent_BTC), -1)"),),
        "test_an_entry_is_the_latent_and_then_the_rotated_key",
        "an entry is [latent; rotated key], at [page, place]",
    ),
    Mistake(
        8, "one position too far", "Transformer.cached_rows",
        (("self.turn(positions_BT)", "self.turn(positions_BT + (T == 1))"),),
        "test_decoding_equals_the_whole_row_at_once",
        "the first new token after n has the position n: compare places, angles and what is seen",
    ),
    Mistake(
        8, "angles by the place in the page", "Transformer.cached_rows",
        (("self.turn(positions_BT)", "self.turn(place_BT)"),),
        "test_decoding_over_pages_equals_the_whole_row",
        "keys turn by their position in the text, not by their place in the page",
    ),
    Mistake(
        8, "documents see each other", "MLA.forward", (("rows.starts_BT", "None"),),
        "test_documents_in_one_row_do_not_see_each_other",
        "rows.starts_BT says where each token's document begins: `naive` needs it",
    ),
    Mistake(
        9, "the token that crosses is dropped", "choose",
        (("ordered_BV.exp().cumsum(-1) - ordered_BV.exp()", "ordered_BV.exp().cumsum(-1)"),),
        "test_a_token_is_kept_whatever_its_probability",
        "count what stands before a token, not the token itself: one is always kept",
    ),
    Mistake(
        9, "the token that crosses is dropped, but for the first", "choose",
        (("ordered_BV.exp().cumsum(-1) - ordered_BV.exp()",
          "ordered_BV.exp().cumsum(-1) * (torch.arange(order_BV.shape[-1]) > 0)"),),
        "test_the_token_that_crosses_top_p_is_kept",
        "the kept tokens together reach top_p: the one that crosses it is among them",
    ),
    Mistake(
        9, "not renormalised", "choose",
        (("F.log_softmax(logprobs_BV.masked_fill(dropped_BV, -math.inf), -1)",
          "logprobs_BV.masked_fill(dropped_BV, -math.inf)"),),
        "test_the_log_prob_is_of_what_was_drawn_from",
        "the log-prob is that of the kept tokens' distribution, whose sum is 1",
    ),
    Mistake(
        9, "the temperature after the filter", "choose",
        (("F.log_softmax(logits_BV / temperature, -1)", "F.log_softmax(logits_BV, -1)"),
         ("logprobs_BV.masked_fill(dropped_BV, -math.inf)",
          "logprobs_BV.masked_fill(dropped_BV, -math.inf) / temperature")),
        "test_the_temperature_comes_before_top_p", "divide by the temperature first, then filter",
    ),
    Mistake(
        10, "a greedy expression", "format_reward",
        whole('''    form = r"\\s*<think>.*\\S.*</think>\\s*<answer>.*\\S.*</answer>\\s*"
    if not tags:
        form = r"\\s*<think>.*\\S.*</think>.*\\S.*"
    return float(re.fullmatch(form, response, re.DOTALL) is not None)'''),
        "test_each_tag_comes_once", "`.*` matches tags as well: count them first",
    ),
    Mistake(
        10, "searched for, not matched", "format_reward",
        (("blank and all(filled)", "all(filled)"),),
        "test_nothing_stands_outside", "only white space may stand before, between and after",
    ),
    Mistake(
        10, "empty parts", "format_reward", (("blank and all(filled)", "blank"),),
        "test_reasoning_and_answer_are_not_empty", "an empty reasoning or answer earns nothing",
    ),
    Mistake(
        11, "from inside the reasoning", "extract_answer",
        (("_, text = split_reasoning(response)", "text = response"),),
        "test_the_answer_is_not_taken_from_the_reasoning",
        "look for the answer after the reasoning only: split_reasoning",
    ),
    Mistake(
        11, "an earlier box for a malformed one", "extract_answer",
        (("answer = last_box(after)",
          'answer = (re.findall(r"\\\\boxed\\{([^{}]*)\\}", after) or [None])[-1]'),
         ("not BOX.search(after)", "answer is None")),
        "test_an_earlier_box_does_not_replace_a_malformed_last_one",
        "the last answer counts, even if it is malformed: then there is none",
    ),
    Mistake(
        11, "the first answer", "extract_answer",
        (('text.rpartition("</answer>")', 'text.partition("</answer>")'),),
        "test_the_last_answer_counts", "of several answers the last one counts",
    ),
    Mistake(
        11, "the gold anywhere in the answer", "accuracy_reward",
        (("check(offered(response, check), gold)", 'gold in (extract_answer(response) or "")'),),
        "test_a_right_answer_earns_1_and_any_other_0",
        "`gold in answer` pays for 14 and for '4 or 5': ask check",
    ),
    Mistake(
        12, "the diagonal masked", "flash_attention",
        (("unseen_TN = key_N >", "unseen_TN = key_N >="),),
        "test_one_tile_is_plain_causal_attention", "a query sees itself and all keys before it",
    ),
    Mistake(
        12, "the values don't shrink", "flash_attention",
        (("shrink_T[:, None] * acc_TU", "acc_TU"), ("shrink_T * sum_T", "sum_T")),
        "test_a_larger_maximum_shrinks_what_was_summed",
        "what was summed with a smaller maximum shrinks by e^(m - m'): l and O",
    ),
    Mistake(
        12, "the sum does not shrink", "flash_attention", (("shrink_T * sum_T", "sum_T"),),
        "test_a_larger_maximum_shrinks_what_was_summed",
        "what was summed with a smaller maximum shrinks by e^(m - m'): l and O",
    ),
    Mistake(
        12, "no maximum", "flash_attention",
        (("torch.maximum(max_T, scores_TN.amax(1))", "torch.zeros_like(max_T)"),
         ("(max_T - new_max_T).exp()", "1 + 0 * sum_T")),
        "test_large_scores_do_not_overflow", "subtract the maximum before the exponential",
    ),
    Mistake(
        12, "a row at once", "flash_attention",
        whole("""    out, lse = [], []
    for t in range(len(q_TK)):
        scores = scale * (k_TK[: t + 1] @ q_TK[t])
        lse.append(scores.logsumexp(0))
        out.append((scores - lse[-1]).exp() @ v_TU[: t + 1])
    return torch.stack(out), torch.stack(lse)"""),
        "test_no_sum_goes_over_more_than_a_tile",
        "a query's scores are never all there: take `tile` keys, and go on from m, l and O",
    ),
    Mistake(
        12, "all scores at once", "flash_attention",
        whole("""    scores_TT = scale * q_TK @ k_TK.T
    unseen_TT = torch.ones_like(scores_TT).triu(1).bool()
    scores_TT = scores_TT.masked_fill(unseen_TT, float("-inf"))
    return scores_TT.softmax(1) @ v_TU, scores_TT.logsumexp(1)"""),
        "test_no_tensor_has_more_numbers_than_t_times_tile",
        "T x T scores are what this avoids: make those of `tile` keys, use them, let them go",
    ),
    Mistake(
        12, "lse without the maximum", "flash_attention",
        (("max_T + sum_T.log()", "sum_T.log()"),),
        "test_the_log_of_the_sums_comes_with_it", "lse = m + log l",
    ),
    Mistake(
        13, "None votes", "majority",
        whole("""    counts = {}
    for answer in answers:
        same = (a for a in counts if a == answer or a and answer and check(a, answer))
        leader = next(same, answer)
        counts[leader] = counts.get(leader, 0) + 1
    return max(counts, key=counts.get, default=None)"""),
        "test_none_does_not_vote", "None and blanks are no answers: leave them out of the count",
    ),
    Mistake(
        13, "ties to the latest", "majority",
        (("max(groups, key=groups.__getitem__, default=None)",
          "max(reversed(groups), key=groups.__getitem__, default=None)"),),
        "test_a_tie_goes_to_the_earliest", "of groups that are equally large, the earliest wins",
    ),
    Mistake(
        13, "counted as text", "majority",
        (("if check(answer, other)", "if answer == other"),),
        "test_equal_answers_vote_together", "answers that are equal under `check` are one group",
    ),
)  # fmt: skip
