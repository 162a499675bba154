#include "kvcull/policies/obcache.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvcull/policies/h2o.hpp"
#include "support/catch.hpp"
#include "support/conformance.hpp"
#include "support/failure.hpp"
#include "support/hooks.hpp"

using namespace kvcull;
using namespace kvcull::test;
using Score = OBCache::Score;
using Base = OBCache::Base;

namespace {

constexpr CacheShape small{.layers = 1, .q_heads = 6, .kv_heads = 2, .head_dim = 8, .value_dim = 12};
constexpr Budget roomy{.tokens = 1000};
constexpr std::size_t n = 24;
constexpr Score all_scores[]{Score::attention, Score::value_l1, Score::value,
                             Score::key,       Score::joint,    Score::separate};

/// Keys and values of one KV head.
struct Head {
    std::vector<float> k, v;

    Head(const Stream& stream, std::size_t head) {
        const auto copy = [&](const std::vector<float>& all, std::size_t dim) {
            const auto from = all.begin() + static_cast<std::ptrdiff_t>(head * stream.tokens * dim);
            return std::vector<float>(from, from + static_cast<std::ptrdiff_t>(stream.tokens * dim));
        };
        k = copy(stream.k, stream.shape.head_dim);
        v = copy(stream.v, stream.shape.values());
    }
};
/// Query head `q_head` of a stream over such rows, causal.
ReferenceAttention attention_of(const Stream& stream, std::size_t q_head, const Head& rows) {
    const std::size_t tokens = stream.tokens, dim = stream.shape.head_dim;
    std::vector<Visible> visible(tokens);
    for (std::size_t i = 0; i < tokens; ++i) visible[i] = {0, 0, i + 1};
    return reference_attention(std::span(stream.q).subspan(q_head * tokens * dim, tokens * dim), rows.k,
                               rows.v, visible, tokens, dim, stream.shape.values(),
                               1.0 / std::sqrt(static_cast<double>(dim)));
}

/// Which query rows count: (query head of the group, token).
using Counts = std::function<bool(std::size_t, std::size_t)>;
Counts from(std::size_t first) {
    return [first](std::size_t, std::size_t token) { return token >= first; };
}
/// The scores of the specification as naive loops.
std::vector<double> expected(const Stream& stream, std::size_t head, Score score, const Counts& counts) {
    const std::size_t tokens = stream.tokens, dim = stream.shape.values(), group = stream.shape.group();
    const Head rows(stream, head);
    std::vector<double> sum(tokens);
    for (std::size_t g = 0; g < group; ++g) {
        const ReferenceAttention seen = attention_of(stream, head * group + g, rows);
        for (std::size_t i = 0; i < tokens; ++i) {
            if (!counts(g, i)) continue;
            for (std::size_t j = 0; j <= i; ++j) {
                const double a = seen.attention[i * tokens + j], z = seen.logits[i * tokens + j];
                double l1 = 0, square = 0, apart = 0, both = 0;
                for (std::size_t c = 0; c < dim; ++c) {
                    const auto v = static_cast<double>(rows.v[j * dim + c]);
                    const double away = v - seen.output[i * dim + c];
                    l1 += std::abs(v);
                    square += v * v;
                    apart += away * away;
                    both += (v + z * away) * (v + z * away);
                }
                const double terms[]{a,
                                     a * l1,
                                     a * a * square,
                                     a * a * z * z * apart,
                                     a * a * both,
                                     a * a * (square + z * z * apart)};
                sum[j] += terms[static_cast<std::size_t>(score)];
            }
        }
    }
    return sum;
}
bool near(std::span<const float> got, std::span<const double> want, double factor = 1.0,
          double relative = 1e-4) {
    if (got.size() != want.size()) return false;
    const double most = *std::max_element(want.begin(), want.end());
    for (std::size_t j = 0; j < got.size(); ++j)
        if (!close(got[j], factor * want[j], relative, 1e-6 * factor * most)) return false;
    return true;
}
bool near(std::span<const float> got, std::span<const float> want, double factor = 1.0) {
    return near(got, std::vector<double>(want.begin(), want.end()), factor);
}
bool finite(std::span<const float> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](const float& x) { return is_finite(x); });
}

/// Scores of head 1 after a prompt that is fed at once and evicts nothing.
std::vector<float> scores_of(const Stream& stream, const OBCache& policy) {
    KVCache cache(stream.shape, policy, roomy);
    feed_prompt(cache, stream, 0, stream.tokens, stream.tokens);
    return cache.scores(0, 1);
}
OBCache whole(Score score) {
    return {.kind = score, .base = Base::h2o_full, .recent = 2};
}

}  // namespace

TEST_CASE("OBCache in every variant keeps the contract of a policy", "[property]") {
    SECTION("defaults with a short tail") {
        policy_conformance(OBCache{.recent = 3});
    }
    SECTION("joint, all rows, lagged") {
        policy_conformance(
            OBCache{.kind = Score::joint, .base = Base::h2o_full, .recent = 2, .sinks = 1, .lagged = true});
    }
    SECTION("TOVA's rows") {
        policy_conformance(OBCache{.kind = Score::separate, .base = Base::tova});
    }
    SECTION("SnapKV's rows and smoothing, norms recomputed") {
        policy_conformance(OBCache{
            .kind = Score::value, .base = Base::snapkv, .recent = 3, .norms = OBCache::Norms::recomputed});
    }
}

TEST_CASE("every score is what its formula says, on every instruction set", "[differential]") {
    const Stream stream = random_stream(small, n, 1);
    for (const Score score : all_scores) {
        CAPTURE(names_of(score)[static_cast<std::size_t>(score)]);
        const auto want = expected(stream, 1, score, from(12));
        for_each_driver(small, OBCache{.kind = score, .recent = 3}, roomy, [&](auto& cache, const auto&) {
            feed_prompt(cache, stream, 0, 15, 15);
            feed_decode(cache, stream, 15, n);
            CHECK(near(cache.scores(0, 1), want));
        });
    }
}

TEST_CASE("scores of a model that caps and biases its logits take its weights, and plain products of keys",
          "[differential]") {
    CacheShape shape = small;
    shape.softcap = 1.5F;
    Stream stream = random_stream(shape, n, 7);
    for (float& x : stream.q) x *= 3.0F;  // far into the cap
    const float slope = 0.1F;
    const std::size_t group = shape.group(), dim = shape.head_dim, values = shape.values();
    const Head rows(stream, 1);
    std::vector<double> want[3];  // key, joint, separate
    for (auto& one : want) one.assign(n, 0.0);
    for (std::size_t g = 0; g < group; ++g)
        for (std::size_t i = 12; i < n; ++i) {
            std::vector<double> z(i + 1), weight(i + 1), output(values);
            double total = 0;
            for (std::size_t j = 0; j <= i; ++j) {
                for (std::size_t c = 0; c < dim; ++c)
                    z[j] += static_cast<double>(stream.queries(0, i, 1).row(group + g, 0)[c]) *
                            static_cast<double>(rows.k[j * dim + c]) / std::sqrt(static_cast<double>(dim));
                weight[j] = std::exp(1.5 * std::tanh(z[j] / 1.5) -
                                     static_cast<double>(slope) * static_cast<double>(i - j));
                total += weight[j];
            }
            for (std::size_t j = 0; j <= i; ++j)
                for (std::size_t c = 0; c < values; ++c)
                    output[c] += weight[j] / total * static_cast<double>(rows.v[j * values + c]);
            for (std::size_t j = 0; j <= i; ++j) {
                double square = 0, apart = 0, both = 0;
                for (std::size_t c = 0; c < values; ++c) {
                    const auto v = static_cast<double>(rows.v[j * values + c]);
                    square += v * v;
                    apart += (v - output[c]) * (v - output[c]);
                    both += std::pow(v + z[j] * (v - output[c]), 2);
                }
                const double a = weight[j] * weight[j] / (total * total);
                want[0][j] += a * z[j] * z[j] * apart;
                want[1][j] += a * both;
                want[2][j] += a * (square + z[j] * z[j] * apart);
            }
        }
    const Score scores[]{Score::key, Score::joint, Score::separate};
    for (std::size_t s = 0; s < 3; ++s)
        for (const bool lagged : {false, true}) {
            CAPTURE(s, lagged);
            const OBCache policy{.kind = scores[s], .recent = 3, .lagged = lagged};
            for_each_driver(shape, policy, roomy, [&](auto& cache, const auto&) {
                cache.set_bias(alibi(std::vector<float>(shape.q_heads, slope)));
                feed_prompt(cache, stream, 0, 15, 15);
                feed_decode(cache, stream, 15, n);
                CHECK(near(cache.scores(0, 1), want[s]));
            });
        }
}

TEST_CASE("joint scores are exact also where values have a mean that dwarfs what sets them apart",
          "[differential]") {
    Stream stream = random_stream(small, n, 6);
    for (float& x : stream.v) x = 30.0F + x;
    for (float& x : stream.q) x *= 6.0F;  // logits far from 0, so that the terms cancel
    for (const OBCache::Norms norms : {OBCache::Norms::kept, OBCache::Norms::recomputed}) {
        OBCache policy = whole(Score::joint);
        policy.norms = norms;
        CHECK(near(scores_of(stream, policy), expected(stream, 1, Score::joint, from(0))));
    }
}

TEST_CASE("scores are the second-order change of the outputs when a key, a value or both shrink",
          "[differential]") {
    const Stream stream = random_stream(small, 16, 2);
    const std::size_t head = 1, values = small.values();
    // Sum over all rows and the group of |o - o'|^2 if row p of K and of V are scaled.
    const auto loss = [&](std::size_t p, double k_scale, double v_scale) {
        const Head before(stream, head);
        double sum = 0;
        for (std::size_t g = 0; g < small.group(); ++g) {
            // A key that is scaled scales its logit, so no new dot products are needed.
            const ReferenceAttention full = attention_of(stream, head * small.group() + g, before);
            for (std::size_t i = p; i < stream.tokens; ++i) {
                std::vector<double> weight(i + 1), output(values);
                double total = 0;
                for (std::size_t j = 0; j <= i; ++j) {
                    const double z = full.logits[i * stream.tokens + j];
                    weight[j] = std::exp(j == p ? k_scale * z : z);
                    total += weight[j];
                }
                for (std::size_t j = 0; j <= i; ++j)
                    for (std::size_t c = 0; c < values; ++c)
                        output[c] += weight[j] / total * (j == p ? v_scale : 1.0) *
                                     static_cast<double>(before.v[j * values + c]);
                for (std::size_t c = 0; c < values; ++c)
                    sum += std::pow(output[c] - full.output[i * values + c], 2);
            }
        }
        return sum;
    };
    for (const Score score : {Score::value, Score::key, Score::joint}) {
        const std::vector<float> got = scores_of(stream, whole(score));
        const bool k = score != Score::value, v = score != Score::key;
        std::vector<double> want;
        for (std::size_t p = 0; p < stream.tokens; ++p) {
            const double e = 1e-3;
            const auto at = [&](double by) { return loss(p, k ? 1 - by : 1, v ? 1 - by : 1); };
            want.push_back((at(e) + at(-e)) / (2 * e * e));
            if (score == Score::value) CHECK(close(got[p], at(1.0), 1e-4, 1e-9));  // exact at any distance
        }
        CAPTURE(names_of(score)[static_cast<std::size_t>(score)]);
        CHECK(near(got, want, 1.0, 1e-3));
    }
}

TEST_CASE("no score is negative, and joint is separate plus a cross term of either sign", "[property]") {
    const Stream stream = random_stream(small, n, 3, 0.1F);
    for (const Score score : all_scores)
        for (const float& x : scores_of(stream, whole(score))) CHECK(x >= 0.0F);
    const auto value = scores_of(stream, whole(Score::value)), key = scores_of(stream, whole(Score::key)),
               joint = scores_of(stream, whole(Score::joint)),
               separate = scores_of(stream, whole(Score::separate));
    std::size_t above = 0;
    for (std::size_t j = 0; j < n; ++j) {
        CHECK(close(separate[j], static_cast<double>(value[j]) + static_cast<double>(key[j]), 1e-5, 0));
        above += joint[j] > separate[j] ? 1 : 0;
    }
    CHECK(above > 0);
    CHECK(above < n);
}

TEST_CASE("rotated, scaled and equal values, scaled and shifted keys do what the formulas say",
          "[property]") {
    const Stream stream = random_stream(small, n, 4);
    const std::size_t dim = small.values();
    for (const Score score : {Score::value, Score::key, Score::joint, Score::separate}) {
        CAPTURE(names_of(score)[static_cast<std::size_t>(score)]);
        const std::vector<float> plain = scores_of(stream, whole(score));

        Stream rotated = stream;
        for (std::size_t j = 0; j < rotated.v.size(); j += dim)
            for (std::size_t c = 0; c + 1 < dim; ++c) {  // plane rotations, one after the other
                float &x = rotated.v[j + c], &y = rotated.v[j + c + 1];
                const float old = x;
                x = 0.6F * old - 0.8F * y;
                y = 0.8F * old + 0.6F * y;
            }
        CHECK(near(scores_of(rotated, whole(score)), plain));

        Stream scaled = stream;
        for (float& x : scaled.v) x *= 3.0F;
        CHECK(near(scores_of(scaled, whole(score)), plain, 9.0));

        Stream traded = stream;
        for (float& x : traded.q) x *= 4.0F;
        for (float& x : traded.k) x *= 0.25F;
        CHECK(same_bits(scores_of(traded, whole(score)), plain));

        Stream shifted = stream;  // all logits of a row by the same number: A and o stay
        for (std::size_t i = 0; i < shifted.k.size(); ++i) shifted.k[i] += i % small.head_dim == 0 ? 2.0F : 0;
        CHECK(near(scores_of(shifted, whole(score)), plain) == (score == Score::value));
    }

    Stream equal = stream;
    for (std::size_t i = 0; i < equal.v.size(); ++i) equal.v[i] = stream.v[i % dim];
    for (const float& x : scores_of(equal, whole(Score::key))) CHECK(x < 1e-9F);
    CHECK(near(scores_of(equal, whole(Score::joint)), scores_of(equal, whole(Score::value))));

    Stream blind = stream;
    std::fill(blind.q.begin(), blind.q.end(), 0.0F);
    for (const float& x : scores_of(blind, whole(Score::key))) CHECK(x == 0.0F);
    CHECK(near(scores_of(blind, whole(Score::joint)), scores_of(blind, whole(Score::value))));
}

TEST_CASE("the score `attention` is the base: H2O, TOVA of single heads, smoothed windows", "[property]") {
    const Stream stream = random_stream(small, 60, 5);
    const auto compare = [&](const OBCache& policy, const auto& base) {
        KVCache got(small, policy, Budget{.tokens = 14});
        KVCache want(small, base, Budget{.tokens = 14});
        feed_prompt(got, stream, 0, 40, 15);
        feed_prompt(want, stream, 0, 40, 15);
        for (std::size_t at = 40; at < 60; ++at) {
            feed(got, stream, at, 1);
            feed(want, stream, at, 1);
            REQUIRE((all_positions(got) == all_positions(want)));
        }
        CHECK(near(got.scores(0, 1), want.scores(0, 1), 3.0));
    };
    compare({.kind = Score::attention, .base = Base::h2o_full, .recent = 7}, H2O{});
    compare({.kind = Score::attention, .recent = 4}, H2O{.recent = 4, .window = 4});
    compare({.kind = Score::attention, .base = Base::tova}, Tova{.share = Tova::Share::kv_head});
    compare({.kind = Score::attention, .base = Base::snapkv, .recent = 4},
            H2O{.recent = 4, .window = 4, .kernel = 7, .pool = Pool::max});
}

TEST_CASE("values of one norm rank by squared attention, and equal query heads multiply the score",
          "[property]") {
    Stream stream = random_stream(small, n, 6);
    for (float& x : stream.v) x = x < 0 ? -0.5F : 0.5F;
    std::vector<double> squares(n);
    for (std::size_t g = 0; g < 3; ++g) {
        const auto seen = attention_of(stream, 3 + g, Head(stream, 1));
        for (std::size_t i = 0; i < n * n; ++i) squares[i % n] += std::pow(seen.attention[i], 2);
    }
    CHECK(near(scores_of(stream, whole(Score::value)), squares, 3.0));  // |v|^2 = 12 / 4

    const CacheShape alone{
        .layers = 1, .q_heads = 2, .kv_heads = 2, .head_dim = 8, .value_dim = small.value_dim};
    const Stream one = random_stream(alone, n, 7);
    Stream three{.shape = small, .tokens = n, .q = {}, .k = one.k, .v = one.v};
    for (std::size_t head = 0; head < 6; ++head)
        three.q.insert(three.q.end(), one.q.begin() + static_cast<std::ptrdiff_t>(head / 3 * n * 8),
                       one.q.begin() + static_cast<std::ptrdiff_t>((head / 3 + 1) * n * 8));
    for (const Score score : all_scores)
        CHECK(near(scores_of(three, whole(score)), scores_of(one, whole(score)), 3.0));
}

TEST_CASE("all rows one by one give the state of rows together; a wide window is all rows", "[property]") {
    const Stream stream = random_stream(small, n, 8);
    for (const Score score : all_scores) {
        const std::vector<float> together = scores_of(stream, whole(score));
        KVCache chunks(small, whole(score), roomy), apart(small, whole(score), roomy);
        feed_prompt(chunks, stream, 0, n, 7);
        feed_decode(apart, stream, 0, n);
        CHECK(near(chunks.scores(0, 1), together));
        CHECK(near(apart.scores(0, 1), together));
        CHECK(same_bits(scores_of(stream, {.kind = score, .recent = 2, .window = 100}), together));
    }
}

TEST_CASE("a prompt in chunks scores like a prompt at once if its last call holds the window", "[property]") {
    const Stream stream = random_stream(small, 40, 9);
    for (const Base base : {Base::h2o, Base::snapkv, Base::tova}) {
        const OBCache policy{.kind = Score::joint,
                             .base = base,
                             .recent = base == Base::tova ? std::nullopt : std::optional<std::size_t>(6)};
        KVCache chunks(small, policy, roomy), short_end(small, policy, roomy);
        feed_prompt(chunks, stream, 0, 40, 32);     // the last call brings 8 rows
        feed_prompt(short_end, stream, 0, 40, 38);  // the last call brings 2 rows
        CHECK(near(chunks.scores(0, 1), scores_of(stream, policy)));
        CHECK(near(short_end.scores(0, 1), scores_of(stream, policy)) == (base == Base::tova));
    }
}

TEST_CASE("lagged and direct evaluation give the same bits at every decision, whatever lies between",
          "[differential]") {
    constexpr std::size_t tokens = 400;
    const Stream stream = random_stream(small, tokens, 10);
    const std::size_t slack = GENERATE(std::size_t{0}, 7);
    const Score score = GENERATE(Score::key, Score::joint, Score::separate);
    const Base base = GENERATE(Base::h2o, Base::tova);
    CAPTURE(slack, static_cast<int>(score), static_cast<int>(base));
    const auto run = [&](bool lagged) {
        std::vector<std::vector<float>> log;
        const OBCache policy{
            .kind = score, .base = base, .recent = base == Base::tova ? 0 : 3, .lagged = lagged};
        Engine<Recording<OBCache>> engine(small, {policy, log}, {.tokens = 12, .slack = slack});
        SplitMix64 random{slack};
        feed_prompt(engine, stream, 0, 30, 11);
        for (std::size_t at = 30; at < tokens;) {
            const double chance = random.uniform();
            const std::size_t count = chance < 0.1 && at + 3 <= tokens ? 3 : 1;
            std::vector<float> out(small.q_heads * count * small.values());
            engine.append(0, stream.keys(0, at, count), stream.values(0, at, count));
            const auto q = stream.queries(0, at, count);
            if (chance > 0.8)  // the engine attends by itself
                engine.attend(0, q, {});
            else
                engine.attend(0, q, head_major(out.data(), small.q_heads, count, small.values()));
            engine.end_step();
            at += count;
            if (chance > 0.2 && chance < 0.23 && !engine.evictor().live().hold) engine.make_room(2);
            if (chance > 0.3 && chance < 0.33) engine.truncate(2);
            if (chance > 0.4 && chance < 0.43) engine.hold(true);
            if (chance > 0.5 && chance < 0.55) engine.hold(false);
            if (chance > 0.6 && chance < 0.65) {
                Engine<Recording<OBCache>> copy = engine;
                log.push_back(copy.scores(0, 1));
                feed(copy, stream, at % 300, 1);
            }
        }
        return log;
    };
    const auto direct = run(false), lagged = run(true);
    REQUIRE(direct.size() == lagged.size());
    CHECK(direct.size() > 60);
    bool same = true;
    for (std::size_t i = 0; i < direct.size(); ++i) same = same && same_bits(direct[i], lagged[i]);
    CHECK(same);
}

TEST_CASE("a pass over the values adds what waits only once, and saves nothing but time", "[property]") {
    const Stream stream = random_stream(small, 90, 11);
    const OBCache policy{.recent = 3, .lagged = true};
    KVCache hooked(small, policy, Budget{.tokens = 12, .slack = 5});
    KVCache alone(small, Unhooked<OBCache>{policy}, Budget{.tokens = 12, .slack = 5});
    feed_prompt(hooked, stream, 0, 30, 30);
    feed_prompt(alone, stream, 0, 30, 30);
    for (std::size_t at = 30; at < 90; ++at) {
        feed(hooked, stream, at, 1);
        feed(alone, stream, at, 1);
        REQUIRE(same_bits(hooked.scores(0, 1), alone.scores(0, 1)));
    }
}

TEST_CASE("norms that are kept and norms that are recomputed give the same scores", "[property]") {
    const Stream stream = random_stream(small, 70, 12);
    for (const Score score : {Score::value_l1, Score::value, Score::separate}) {
        OBCache policy{.kind = score, .recent = 3};
        KVCache kept(small, policy, Budget{.tokens = 12});
        policy.norms = OBCache::Norms::recomputed;
        KVCache again(small, policy, Budget{.tokens = 12});
        feed_prompt(kept, stream, 0, 40, 13);
        feed_prompt(again, stream, 0, 40, 13);
        feed_decode(kept, stream, 40, 70);
        feed_decode(again, stream, 40, 70);
        CHECK((all_positions(kept) == all_positions(again)));
        CHECK(near(kept.scores(0, 1), again.scores(0, 1)));
        CHECK(kept.evictor().bytes() > again.evictor().bytes());
    }
}

TEST_CASE("a value that is not finite leaves as soon as it may and poisons nothing for good", "[property]") {
    const std::size_t bad = 30, dim = small.values();
    for (const float& poison : {quiet_nan(), negative_infinity(), positive_infinity(), 1e30F}) {
        Stream stream = random_stream(small, 60, 13);
        stream.v[(60 + bad) * dim + 3] = poison;  // head 1
        for (const Score score : {Score::value_l1, Score::value, Score::key, Score::joint, Score::separate})
            for (const bool in_prompt : {false, true}) {
                // Finite values of infinite norm: the outputs beside them are finite too, and count.
                if (is_finite(poison) && score != Score::value && score != Score::value_l1) continue;
                CAPTURE(static_cast<int>(score), in_prompt, poison);
                const std::size_t prompt = in_prompt ? 32 : 25, recent = 4;
                const bool lagged = score == Score::joint;
                for_each_driver(small, OBCache{.kind = score, .recent = recent, .lagged = lagged},
                                {.tokens = 12}, [&](auto& cache, const std::string&) {
                                    feed_prompt(cache, stream, 0, prompt, prompt);
                                    const auto held = [&] {
                                        const auto all = positions_of(cache.view(0, 1));
                                        return std::find(all.begin(), all.end(), position_t{bad}) !=
                                               all.end();
                                    };
                                    bool right = true;
                                    for (std::size_t at = prompt; at < 60; ++at) {
                                        feed(cache, stream, at, 1);
                                        right = right && held() == (at >= bad && at < bad + recent);
                                    }
                                    CHECK(right);
                                    const std::vector<float> scores = cache.scores(0, 1);
                                    CHECK(finite(scores));
                                    CHECK(*std::max_element(scores.begin(), scores.end()) > 0);
                                });
            }
    }
}

TEST_CASE("a query row with logits that are not finite gives nothing to anybody", "[differential]") {
    for (const float& poison : {quiet_nan(), positive_infinity()}) {
        Stream stream = random_stream(small, n, 14);
        const Stream clean = stream;
        stream.q[(4 * n + 9) * small.head_dim + 2] = poison;  // second query head of KV head 1, token 9
        for (const Score score : all_scores) {
            const auto want = expected(clean, 1, score,
                                       [](std::size_t g, std::size_t token) { return g != 1 || token != 9; });
            CHECK(near(scores_of(stream, whole(score)), want));
            KVCache decoded(small, whole(score), roomy);
            feed_decode(decoded, stream, 0, n);
            CHECK(near(decoded.scores(0, 1), want));
        }
    }
}

TEST_CASE("a logit of minus infinity is a row that is not seen", "[property]") {
    Stream stream = random_stream(small, n, 17);
    for (std::size_t i = 0; i < stream.q.size(); i += small.head_dim)
        stream.q[i] = 1.0F + std::abs(stream.q[i]);
    Stream far = stream;
    float *infinite = &stream.k[(n + 5) * small.head_dim], *finite_but_far = &far.k[(n + 5) * small.head_dim];
    *infinite = negative_infinity();
    *finite_but_far = -1e6F;
    for (const Score score : all_scores)
        for (const bool lagged : {false, true}) {
            if (lagged && score < Score::key) continue;
            OBCache policy = whole(score);
            policy.lagged = lagged;
            KVCache got(small, policy, roomy), want(small, policy, roomy);
            feed_prompt(got, stream, 0, 15, 15);
            feed_prompt(want, far, 0, 15, 15);
            feed_decode(got, stream, 15, n);
            feed_decode(want, far, 15, n);
            CHECK(got.scores(0, 1)[5] == 0.0F);
            CHECK(same_bits(got.scores(0, 1), want.scores(0, 1)));
        }
}

TEST_CASE("values that are nearly equal keep their differences", "[differential]") {
    Stream stream = random_stream(small, n, 18);
    for (std::size_t i = 0; i < stream.v.size(); ++i)
        stream.v[i] = 1.0F + static_cast<float>(i % small.values()) + 1e-3F * stream.v[i];
    for (const Score score : {Score::key, Score::joint, Score::separate})
        CHECK(near(scores_of(stream, whole(score)), expected(stream, 1, score, from(0)), 1.0, 1e-2));
}

TEST_CASE("before any query row was seen all scores are zero", "[property]") {
    const Stream stream = random_stream(small, 3, 19);
    for (const Score score : all_scores) {
        KVCache cache(small, whole(score), roomy);
        CHECK(cache.scores(0, 1).empty());
        cache.append(0, stream.keys(0, 0, 3), stream.values(0, 0, 3));
        CHECK(same_bits(cache.scores(0, 1), std::vector<float>(3)));
    }
}

TEST_CASE("zero values score zero by value, and a row that sees one token gives its key nothing",
          "[property]") {
    Stream stream = random_stream(small, n, 15);
    std::fill_n(stream.v.begin() + static_cast<std::ptrdiff_t>((n + 5) * small.values()), small.values(), 0);
    CHECK(scores_of(stream, whole(Score::value))[5] == 0.0F);
    CHECK(scores_of(stream, whole(Score::value_l1))[5] == 0.0F);
    CHECK(scores_of(stream, whole(Score::key))[5] > 0.0F);
    KVCache cache(small, whole(Score::key), roomy);
    feed_decode(cache, stream, 0, 1);
    CHECK(cache.scores(0, 1)[0] == 0.0F);
}

TEST_CASE("without eviction while decoding the cache grows and decoded rows do not count", "[property]") {
    const Stream stream = random_stream(small, 50, 16);
    KVCache cache(small, OBCache{.recent = 3, .decode_evict = false}, Budget{.tokens = 12});
    feed_prompt(cache, stream, 0, 30, 30);
    REQUIRE(cache.rows(0, 1) == 12);
    const std::vector<float> before = cache.scores(0, 1);
    feed_decode(cache, stream, 30, 50);
    REQUIRE(cache.rows(0, 1) == 32);
    const std::vector<float> after = cache.scores(0, 1);
    CHECK(same_bits(std::span(after).first(12), before));
    CHECK(same_bits(std::span(after).subspan(12), std::vector<float>(20)));
    feed_prompt(cache, stream, 0, 5, 5);  // the next turn's prompt evicts again
    CHECK(cache.rows(0, 1) == 12);
}

TEST_CASE("parameters that do not fit each other are refused before anything exists", "[contract]") {
    const auto refusal = [](const OBCache& policy, std::size_t budget = 12) {
        return failure<error::config_error>([&] { KVCache(small, policy, Budget{.tokens = budget}); });
    };
    CHECK(refusal({.recent = 3, .kernel = 4}) == "OBCache: kernel is 4, want an odd number");
    CHECK(refusal({.recent = 12}) == "OBCache: recent is 12, want below the budget 12");
    CHECK(refusal({}, 16) == "OBCache: recent is 16, want below the budget 16");
    CHECK(refusal({.base = Base::snapkv, .recent = 20}) == "OBCache: recent is 20, want below the budget 12");
    CHECK(refusal({.recent = 0}) == "OBCache: recent is 0, want at least 1, or a window");
    CHECK(refusal({.base = Base::tova, .window = 2}) == "OBCache: window is 2, want 1 with base tova");
    for (const Score score : {Score::attention, Score::value_l1, Score::value})
        CHECK(refusal({.kind = score, .recent = 3, .lagged = true}) ==
              "OBCache: lagged is true, want false unless the score is key, joint or separate");
    CHECK(refusal({.recent = 0, .window = 4}) == "no error");
    CHECK(refusal({.base = Base::h2o_full, .recent = 0}) == "no error");
    CHECK(refusal({.base = Base::tova}) == "no error");
    CHECK(refusal({.base = Base::tova, .recent = 20}) == "no error");
}
