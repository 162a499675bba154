#include "kvcull/cache/evictor.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvcull/policies.hpp"
#include "support/catch.hpp"
#include "support/every_policy.hpp"
#include "support/failure.hpp"
#include "support/foreign.hpp"
#include "support/reference.hpp"
#include "support/stubs.hpp"

using namespace kvcull;
using namespace kvcull::test;

namespace {

constexpr CacheShape small{.layers = 2, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .value_dim = 6};
constexpr std::size_t tokens = 40;

using E = Evictor<H2O>;

/// Rows of head 0 of each layer that end elsewhere than they should.
struct Wrong {
    std::vector<HeadView> heads;

    explicit Wrong(const CacheView& view) : heads(view.heads.begin(), view.heads.end()) {}
    [[nodiscard]] CacheView view() const { return {heads, 2}; }
    [[nodiscard]] LayerView layer(std::size_t index) const { return view().layer(index); }
};
RowsView first_rows(const RowsView& rows, std::size_t count) {
    return {rows.row(0), rows.dtype(), count, rows.dim(), rows.stride()};
}
RowsView with_dim(const RowsView& rows, std::size_t dim) {
    return {rows.row(0), rows.dtype(), rows.rows(), dim, rows.stride()};
}

/// A call that must be refused, with the message that it must give.
struct Refused {
    std::string message;
    std::function<std::string(E&, Foreign&, const TokenStream&)> call;
};
template <class Error>
Refused refused(std::string message, std::function<void(E&, Foreign&, const TokenStream&)> call) {
    return {std::move(message),
            [call = std::move(call)](E& evictor, Foreign& rows, const TokenStream& stream) {
                return failure<Error>([&] { call(evictor, rows, stream); });
            }};
}

/// Appends the rows of token `seen` of both heads of `layer` to the buffers, at `position`.
LayerView arrive(E& evictor, Foreign& rows, const TokenStream& stream, std::size_t layer, position_t position,
                 std::size_t count = 1) {
    rows.append(layer, stream.k(layer, evictor.seen(), count), stream.v(layer, evictor.seen(), count),
                position);
    return rows.layer(layer);
}
LayerView arrive(E& evictor, Foreign& rows, const TokenStream& stream, std::size_t layer) {
    return arrive(evictor, rows, stream, layer, evictor.next_position());
}
HeadsView<const float> q_of(const E& evictor, const TokenStream& stream, std::size_t layer,
                            std::size_t count = 1) {
    return stream.q(layer, evictor.seen(), count);
}

/// Every case on a copy of `evictor` and `rows`; then the copy goes on as if nothing had happened.
void check_refused(const E& evictor, const Foreign& rows, const TokenStream& stream,
                   const std::vector<Refused>& cases, const std::function<void(E&, Foreign&)>& go_on) {
    E twin = evictor;
    Foreign twin_rows = rows;
    go_on(twin, twin_rows);
    for (const Refused& one : cases) {
        CAPTURE(one.message);
        E tried = evictor;
        Foreign scrap = rows;  // what the engine prepared for the refused call it throws away
        REQUIRE(one.call(tried, scrap, stream) == one.message);
        REQUIRE(same_live(tried.live(), evictor.live()));
        Foreign own = rows;
        go_on(tried, own);
        REQUIRE(same_live(tried.live(), twin.live()));
        for (std::size_t i = 0; i < 4; ++i)
            REQUIRE(own.positions(i / 2, i % 2) == twin_rows.positions(i / 2, i % 2));
    }
}

}  // namespace

TEST_CASE("between steps, calls with wrong arguments or out of order are refused and change nothing",
          "[contract]") {
    const TokenStream stream(small, tokens, 1);
    E evictor(small, H2O{}, Budget{.tokens = 8});
    Foreign rows(small);
    evictor.pin(3, 5);
    for (std::size_t token = 0; token < 12; ++token) feed(evictor, rows, stream, token, 1);
    REQUIRE(rows.positions(0, 0).size() == 8);
    using error::config_error, error::shape_error, error::state_error;
    const std::vector<Refused> cases{
        refused<shape_error>(
            "Evictor::step: layer is 2, want below 2",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(2, arrive(e, r, s, 0), q_of(e, s, 0)); }),
        refused<shape_error>(
            "Evictor::step: cached[0].k.rows() is 8, want 9",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(0, r.layer(0), q_of(e, s, 0)); }),
        refused<shape_error>("Evictor::step: cached.size() is 1, want 2",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 e.step(0, arrive(e, r, s, 0).first(1), q_of(e, s, 0));
                             }),
        refused<shape_error>("Evictor::step: cached[1].v.rows() is 8, want 9",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 arrive(e, r, s, 0);
                                 Wrong wrong(r.view());
                                 wrong.heads[1].v = first_rows(wrong.heads[1].v, 8);
                                 e.step(0, wrong.layer(0), q_of(e, s, 0));
                             }),
        refused<shape_error>("Evictor::step: cached[1].position.size() is 8, want 9",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 arrive(e, r, s, 0);
                                 Wrong wrong(r.view());
                                 wrong.heads[1].position = std::span(r.positions(0, 1)).first(8);
                                 e.step(0, wrong.layer(0), q_of(e, s, 0));
                             }),
        refused<shape_error>("Evictor::step: cached[0].k.dim() is 7, want 8",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 arrive(e, r, s, 0);
                                 Wrong wrong(r.view());
                                 wrong.heads[0].k = with_dim(wrong.heads[0].k, 7);
                                 e.step(0, wrong.layer(0), q_of(e, s, 0));
                             }),
        refused<shape_error>("Evictor::step: cached[0].v.dim() is 8, want 6",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 arrive(e, r, s, 0);
                                 Wrong wrong(r.view());
                                 wrong.heads[0].v = with_dim(wrong.heads[0].v, 8);
                                 e.step(0, wrong.layer(0), q_of(e, s, 0));
                             }),
        refused<shape_error>(
            "Evictor::step: q.heads is 2, want 4",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(0, arrive(e, r, s, 0), s.k(0, 12, 1)); }),
        refused<shape_error>("Evictor::step: q.dim is 7, want 8",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 auto q = q_of(e, s, 0);
                                 q.dim = 7;
                                 e.step(0, arrive(e, r, s, 0), q);
                             }),
        refused<shape_error>("Evictor::step: q.data is null, want a pointer",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 auto q = q_of(e, s, 0);
                                 q.data = nullptr;
                                 e.step(0, arrive(e, r, s, 0), q);
                             }),
        refused<shape_error>(
            "Evictor::step: tokens is 0, want at least 1",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(0, r.layer(0), q_of(e, s, 0, 0)); }),
        refused<shape_error>("Evictor::step: out.tokens is 2, want 1",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 2);
                                 e.step(0, arrive(e, r, s, 0), q_of(e, s, 0), out.layer(0));
                             }),
        refused<shape_error>("Evictor::step: out.dim is 8, want 6",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 1);
                                 auto view = out.layer(0);
                                 view.dim = 8;
                                 e.step(0, arrive(e, r, s, 0), q_of(e, s, 0), view);
                             }),
        refused<shape_error>(
            "Evictor::step: cached[0].position of a new row is 11, want beyond 11",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(0, arrive(e, r, s, 0, 11), q_of(e, s, 0)); }),
        refused<shape_error>("Evictor::step: cached[0].position of a new row is 15, want beyond 15",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 r.append(0, s.k(0, 12, 2), s.v(0, 12, 2), std::vector<position_t>{15, 15});
                                 e.step(0, r.layer(0), q_of(e, s, 0, 2));
                             }),
        refused<shape_error>("Evictor::step: cached[1].position of a new row is 13, want 12",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Foreign other = r;
                                 arrive(e, other, s, 0, 13);
                                 arrive(e, r, s, 0, 12);
                                 Wrong wrong(r.view());
                                 wrong.heads[1].position = {other.positions(0, 1)};
                                 e.step(0, wrong.layer(0), q_of(e, s, 0));
                             }),
        refused<shape_error>("Evictor::admit: layer is 5, want below 2",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(5, 1); }),
        refused<shape_error>("Evictor::admit: tokens is 0, want at least 1",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(0, 0); }),
        refused<state_error>(
            "Evictor::end_step: layer 0 is not stepped, want every layer once before end_step",
            [](E& e, Foreign&, const TokenStream&) { e.end_step(); }),
        refused<state_error>("Evictor::end_prompt: phase is not a prompt, want begin_prompt first",
                             [](E& e, Foreign& r, const TokenStream&) { e.end_prompt(r.view()); }),
        refused<shape_error>("Evictor::make_room: tokens is 9, want at most the budget 8",
                             [](E& e, Foreign& r, const TokenStream&) { e.make_room(r.view(), 9); }),
        refused<shape_error>("Evictor::make_room: cached.kv_heads is 0, want 2",
                             [](E& e, Foreign&, const TokenStream&) { e.make_room({}, 1); }),
        refused<shape_error>("Evictor::make_room: cached.heads.size() is 2, want 4",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 e.make_room({r.layer(0), 2}, 1);
                             }),
        refused<shape_error>("Evictor::make_room: cached[0].k.rows() is 7, want 8",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 Wrong wrong(r.view());
                                 wrong.heads[2].k = first_rows(wrong.heads[2].k, 7);
                                 e.make_room(wrong.view(), 1);
                             }),
        refused<shape_error>(
            "Evictor::truncate: tokens is 13, want at most the 12 seen since the last gap in positions",
            [](E& e, Foreign& r, const TokenStream&) { e.truncate(r.view(), 13); }),
        refused<shape_error>("Evictor::truncate: cached.kv_heads is 0, want 2",
                             [](E& e, Foreign&, const TokenStream&) { e.truncate({}, 1); }),
        refused<shape_error>("Evictor::propose: cached.kv_heads is 0, want 2",
                             [](E& e, Foreign&, const TokenStream&) { e.propose({}, 1); }),
        refused<state_error>("Evictor::keep_ascending: tokens seen is 12, want 0",
                             [](E& e, Foreign&, const TokenStream&) { e.keep_ascending(); }),
        refused<shape_error>("Evictor::scores: layer is 2, want below 2",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 std::vector<float> out(8);
                                 e.scores(2, 0, r.layer(0)[0], out);
                             }),
        refused<shape_error>("Evictor::scores: head is 2, want below 2",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 std::vector<float> out(8);
                                 e.scores(0, 2, r.layer(0)[0], out);
                             }),
        refused<shape_error>("Evictor::scores: out.size() is 7, want 8",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 std::vector<float> out(7);
                                 e.scores(0, 0, r.layer(0)[0], out);
                             }),
        refused<shape_error>("Evictor::scores: cached.rows() is 5, want 8",
                             [](E& e, Foreign& r, const TokenStream&) {
                                 std::vector<float> out(8);
                                 Wrong wrong(r.view());
                                 wrong.heads[0].k = first_rows(wrong.heads[0].k, 5);
                                 e.scores(0, 0, wrong.heads[0], out);
                             }),
        refused<shape_error>("Evictor::pin: end is 4, want beyond begin = 4",
                             [](E& e, Foreign&, const TokenStream&) { e.pin(4, 4); }),
        refused<shape_error>("Evictor::pin: begin is -1, want at least 0",
                             [](E& e, Foreign&, const TokenStream&) { e.pin(-1, 4); }),
        refused<config_error>("pin: budget is 8, want at least the pinned 9",
                              [](E& e, Foreign&, const TokenStream&) { e.pin(20, 27); }),
        refused<shape_error>("Evictor::probe: layer is 2, want below 2",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 1);
                                 e.probe(2, r.layer(0), s.q(0, 12, 1), s.k(0, 12, 1), s.v(0, 12, 1),
                                         out.layer(0));
                             }),
        refused<shape_error>("Evictor::probe: q.tokens is 0, want at least 1",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 1);
                                 e.probe(0, r.layer(0), s.q(0, 12, 0), s.k(0, 12, 0), s.v(0, 12, 0),
                                         out.layer(0));
                             }),
        refused<shape_error>("Evictor::probe: k.tokens is 2, want 1",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 1);
                                 e.probe(0, r.layer(0), s.q(0, 12, 1), s.k(0, 12, 2), s.v(0, 12, 1),
                                         out.layer(0));
                             }),
        refused<shape_error>("Evictor::probe: v.dim is 8, want 6",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 Outputs out(small, 1);
                                 e.probe(0, r.layer(0), s.q(0, 12, 1), s.k(0, 12, 1), s.k(0, 12, 1),
                                         out.layer(0));
                             }),
        refused<shape_error>("Evictor::probe: out.heads is 0, want 4",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 e.probe(0, r.layer(0), s.q(0, 12, 1), s.k(0, 12, 1), s.v(0, 12, 1), {});
                             }),
    };
    check_refused(evictor, rows, stream, cases, [&](E& e, Foreign& r) {
        for (std::size_t token = 12; token < 20; ++token) feed(e, r, stream, token, 1);
    });
    REQUIRE_NOTHROW(evictor.pin(22, 24));
    REQUIRE_NOTHROW(evictor.pin(26, 28));
    REQUIRE_NOTHROW(evictor.pin(24, 26));  // one range of six now
    REQUIRE(evictor.live().pinned.size() == 2);
    REQUIRE_THROWS_AS(evictor.pin(28, 29), error::config_error);
    REQUIRE_NOTHROW(evictor.pin(3, 5));  // pinned already: counts once
    REQUIRE_NOTHROW(evictor.pin(4, 5));
    REQUIRE(evictor.live().pinned.size() == 2);
}

TEST_CASE("inside a step, calls out of order are refused and change nothing", "[contract]") {
    const TokenStream stream(small, tokens, 2);
    E evictor(small, H2O{}, Budget{.tokens = 8});
    Foreign rows(small);
    for (std::size_t token = 0; token < 12; ++token) feed(evictor, rows, stream, token, 1);
    rows.append(0, stream.k(0, 12, 1), stream.v(0, 12, 1), 12);
    rows.apply(evictor.step(0, rows.layer(0), stream.q(0, 12, 1)));
    using error::shape_error, error::state_error;
    const auto inside = [](const char* name, std::function<void(E&, Foreign&, const TokenStream&)> call) {
        return refused<state_error>(
            std::string("Evictor::") + name + ": call is inside a step, want after end_step",
            std::move(call));
    };
    const std::vector<Refused> cases{
        refused<state_error>(
            "Evictor::step: layer 0 is already in this step, want end_step first",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(0, arrive(e, r, s, 0, 13), s.q(0, 13, 1)); }),
        refused<state_error>("Evictor::admit: layer 0 is already in this step, want end_step first",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(0, 1); }),
        refused<shape_error>("Evictor::admit: tokens is 2, want 1",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(1, 2); }),
        refused<shape_error>("Evictor::step: tokens is 2, want 1",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 e.step(1, arrive(e, r, s, 1, 12, 2), s.q(1, 12, 2));
                             }),
        refused<shape_error>(
            "Evictor::step: position of the newest row is 13, want 12",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(1, arrive(e, r, s, 1, 13), s.q(1, 12, 1)); }),
        refused<state_error>(
            "Evictor::end_step: layer 1 is not stepped, want every layer once before end_step",
            [](E& e, Foreign&, const TokenStream&) { e.end_step(); }),
        inside("begin_prompt", [](E& e, Foreign&, const TokenStream&) { e.begin_prompt(3); }),
        inside("end_prompt", [](E& e, Foreign& r, const TokenStream&) { e.end_prompt(r.view()); }),
        inside("make_room", [](E& e, Foreign& r, const TokenStream&) { e.make_room(r.view(), 1); }),
        inside("truncate", [](E& e, Foreign& r, const TokenStream&) { e.truncate(r.view(), 1); }),
        inside("propose", [](E& e, Foreign& r, const TokenStream&) { e.propose(r.view(), 1); }),
        inside("hold", [](E& e, Foreign&, const TokenStream&) { e.hold(true); }),
        inside("keep_ascending", [](E& e, Foreign&, const TokenStream&) { e.keep_ascending(); }),
        inside("probe",
               [](E& e, Foreign& r, const TokenStream& s) {
                   Outputs out(small, 1);
                   e.probe(0, r.layer(0), s.q(0, 12, 1), s.k(0, 12, 1), s.v(0, 12, 1), out.layer(0));
               }),
    };
    const auto go_on = [&](E& e, Foreign& r) {
        r.append(1, stream.k(1, 12, 1), stream.v(1, 12, 1), 12);
        r.apply(e.step(1, r.layer(1), stream.q(1, 12, 1)));
        e.end_step();
        for (std::size_t token = 13; token < 20; ++token) feed(e, r, stream, token, 1);
    };
    check_refused(evictor, rows, stream, cases, go_on);

    // Side values taken in, layer 1 waits for its step: the same number of tokens must follow.
    evictor.admit(1, 1);
    const std::vector<Refused> admitted{
        refused<state_error>("Evictor::admit: layer 1 is already in this step, want end_step first",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(1, 1); }),
        refused<shape_error>(
            "Evictor::step: q.tokens is 2, want 1",
            [](E& e, Foreign& r, const TokenStream& s) { e.step(1, arrive(e, r, s, 1), s.q(1, 12, 2)); }),
        refused<state_error>(
            "Evictor::end_step: layer 1 is not stepped, want every layer once before end_step",
            [](E& e, Foreign&, const TokenStream&) { e.end_step(); }),
    };
    check_refused(evictor, rows, stream, admitted, go_on);
}

TEST_CASE("inside a prompt, its total is held to", "[contract]") {
    const TokenStream stream(small, tokens, 3);
    E evictor(small, H2O{}, Budget{.ratio = 0.5});
    Foreign rows(small);
    evictor.begin_prompt(14);
    feed(evictor, rows, stream, 0, 9);
    REQUIRE(evictor.size(1, 1) == 7);
    using error::shape_error, error::state_error;
    const std::vector<Refused> cases{
        refused<shape_error>("Evictor::step: tokens is 6, want at most the 5 left of the prompt's total",
                             [](E& e, Foreign& r, const TokenStream& s) {
                                 e.step(0, arrive(e, r, s, 0, 9, 6), s.q(0, 9, 6));
                             }),
        refused<shape_error>("Evictor::admit: tokens is 6, want at most the 5 left of the prompt's total",
                             [](E& e, Foreign&, const TokenStream&) { e.admit(0, 6); }),
        refused<state_error>("Evictor::end_prompt: tokens seen is 9, want 14",
                             [](E& e, Foreign& r, const TokenStream&) { e.end_prompt(r.view()); }),
    };
    check_refused(evictor, rows, stream, cases, [&](E& e, Foreign& r) {
        feed(e, r, stream, 9, 5);
        r.apply(e.end_prompt(r.view()));
        for (std::size_t token = 14; token < 20; ++token) feed(e, r, stream, token, 1);
        REQUIRE(r.positions(0, 0).size() == 7);
    });
}

TEST_CASE("a ratio wants a prompt, and its total if chunks are evicted", "[contract]") {
    const TokenStream stream(small, tokens, 4);
    Foreign rows(small);
    rows.append(0, stream.k(0, 0, 4), stream.v(0, 0, 4), 0);
    Evictor h2o(small, H2O{}, Budget{.ratio = 0.5});
    REQUIRE(failure<error::state_error>([&] { h2o.step(0, rows.layer(0), stream.q(0, 0, 4)); }) ==
            "Evictor::step: budget is a ratio of a prompt that was not given, want begin_prompt first");
    REQUIRE(failure<error::config_error>([&] { h2o.begin_prompt(); }) ==
            "Evictor::begin_prompt: total is unknown, want the prompt's tokens (the budget is a ratio)");
    REQUIRE(failure<error::state_error>([&] { h2o.step(0, rows.layer(0), stream.q(0, 0, 4)); }) ==
            "Evictor::step: budget is a ratio of a prompt that was not given, want begin_prompt first");
    REQUIRE(h2o.size(0, 0) == unlimited);
    h2o.begin_prompt(4);
    REQUIRE(h2o.size(0, 0) == 2);
    REQUIRE(h2o.step(0, rows.layer(0), stream.q(0, 0, 4)).size() == 2);

    // One that acts only at the prompt's end does not need to know.
    Evictor snapkv(small, SnapKV{.window = 2}, Budget{.ratio = 0.5});
    Foreign own(small);
    snapkv.begin_prompt();
    feed(snapkv, own, stream, 0, 9);
    feed(snapkv, own, stream, 9, 3);
    REQUIRE(snapkv.size(0, 0) == unlimited);
    own.apply(snapkv.end_prompt(own.view()));
    REQUIRE(snapkv.size(0, 0) == 6);
    REQUIRE(own.positions(1, 1).size() == 6);

    // The policy's own rule about budgets is asked when the number is known; the prompt can still be ended.
    Evictor narrow(small, SnapKV{.window = 4}, Budget{.ratio = 0.25});
    Foreign all(small);
    narrow.begin_prompt();
    feed(narrow, all, stream, 0, 12);
    REQUIRE_THROWS_AS(narrow.end_prompt(all.view()), error::config_error);
    REQUIRE(narrow.live().phase == Phase::prompt);
    feed(narrow, all, stream, 12, 12);
    all.apply(narrow.end_prompt(all.view()));
    REQUIRE(all.positions(0, 0).size() == 6);
}

TEST_CASE("an evictor is checked when it is made", "[contract]") {
    const auto made = [](CacheShape shape, auto policy, Budget budget) {
        return failure<error::config_error>([&] { Evictor(shape, policy, budget); });
    };
    CacheShape shape = small;
    REQUIRE(made(shape, H2O{}, {.tokens = 1}) == "no error");
    REQUIRE(made(shape, H2O{}, {}) == "Budget: tokens is 0, want at least 1 (or a ratio, or bytes)");
    REQUIRE(made(shape, H2O{}, {.tokens = 4, .ratio = 0.5}) ==
            "Budget: tokens and ratio is both given, want one of them");
    REQUIRE(made(shape, H2O{}, {.ratio = 1.5}) == "Budget: ratio is 1.500000, want in (0, 1]");
    REQUIRE(made(shape, H2O{}, {.ratio = -0.5}) == "Budget: ratio is -0.500000, want in (0, 1]");
    REQUIRE(made(shape, Full{}, {}) == "no error");  // takes none
    REQUIRE(made(shape, H2O{.kernel = 2}, {.tokens = 4}) == "H2O: kernel is 2, want an odd number");
    REQUIRE(made(shape, H2O{.kernel = 2}, {.ratio = 0.5}) == "H2O: kernel is 2, want an odd number");
    REQUIRE(made(shape, SnapKV{.window = 4}, {.tokens = 4}) ==
            "SnapKV: budget is 4, want more than window + sinks = 4");
    shape.layers = 0;
    REQUIRE(made(shape, H2O{}, {.tokens = 4}) == "CacheShape: layers is 0, want at least 1");
    // A rule may give a layer less than is pinned.
    Evictor<H2O, PyramidLike> pyramid(small, H2O{}, {.ratio = 0.5}, {.step = 4});
    pyramid.pin(0, 5);
    REQUIRE(failure<error::config_error>([&] { pyramid.begin_prompt(10); }) ==
            "pin: budget is 3, want at least the pinned 5");
    REQUIRE(pyramid.size(0, 0) == unlimited);
    REQUIRE(pyramid.live().phase == Phase::decode);
    pyramid.begin_prompt(14);
    REQUIRE(pyramid.size(0, 0) == 9);
    REQUIRE(pyramid.size(1, 0) == 5);
}

TEST_CASE("foreign buffers and KVCache keep the same rows in the same slots, with the same outputs",
          "[differential]") {
    const std::size_t chunk = GENERATE(std::size_t{5}, 17);
    const DType dtype = GENERATE(DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name, chunk, name_of(dtype));
        CacheShape shape = small;
        shape.dtype = dtype;
        const TokenStream stream(shape, tokens, 5);
        KVCache cache(shape, policy, Budget{.tokens = 8});
        Evictor evictor(shape, policy, Budget{.tokens = 8});
        Foreign rows(shape);
        const auto compare = [&] {
            for (std::size_t i = 0; i < 4; ++i) {
                REQUIRE(to_vector(cache.view(i / 2, i % 2).position) == rows.positions(i / 2, i % 2));
                REQUIRE(same_bits(widened(cache.view(i / 2, i % 2).k), widened(rows.layer(i / 2)[i % 2].k)));
                REQUIRE(same_bits(widened(cache.view(i / 2, i % 2).v), widened(rows.layer(i / 2)[i % 2].v)));
            }
            REQUIRE(same_live(cache.evictor().live(), evictor.live()));
        };
        cache.begin_prompt(17);
        evictor.begin_prompt(17);
        in_chunks(17, chunk, [&](std::size_t first, std::size_t count) {
            REQUIRE(same_bits(feed(cache, stream, first, count), feed(evictor, rows, stream, first, count)));
            compare();
        });
        cache.end_prompt();
        rows.apply(evictor.end_prompt(rows.view()));
        for (std::size_t token = 17; token < 30; ++token)
            REQUIRE(same_bits(feed(cache, stream, token, 1), feed(evictor, rows, stream, token, 1)));
        compare();
        cache.make_room(3);
        rows.apply(evictor.make_room(rows.view(), 3));
        compare();
        cache.truncate(2);
        rows.apply(evictor.truncate(rows.view(), 2));
        compare();
    });
}

TEST_CASE("an engine without outputs of ours gets the same plans", "[differential]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 6);
        Evictor with(small, policy, Budget{.tokens = 8}), without(small, policy, Budget{.tokens = 8});
        Foreign a(small), b(small);
        for (std::size_t first = 0; first < 30;) {
            const std::size_t count = first == 0 ? 14 : 1;
            feed(with, a, stream, first, count);
            for (std::size_t layer = 0; layer < 2; ++layer) {
                b.append(layer, stream.k(layer, first, count), stream.v(layer, first, count),
                         static_cast<position_t>(first));
                b.apply(without.step(layer, b.layer(layer), stream.q(layer, first, count)));
            }
            b.apply(without.end_step(b.view()));
            for (std::size_t i = 0; i < 4; ++i)
                REQUIRE(a.positions(i / 2, i % 2) == b.positions(i / 2, i % 2));
            for (std::size_t i = 0; i < 4; ++i) {
                std::vector<float> scores(a.positions(i / 2, i % 2).size()), others(scores.size());
                with.scores(i / 2, i % 2, a.layer(i / 2)[i % 2], scores);
                without.scores(i / 2, i % 2, b.layer(i / 2)[i % 2], others);
                REQUIRE(same_bits(scores, others));
            }
            // Who takes part in our attention may have noted what others compute when they need it.
            constexpr bool reads_along = QueriesKeys<decltype(policy)> || ReadsValues<decltype(policy)>;
            const Needs needs = policy.needs(Phase::decode);
            if (!reads_along && !needs.attention_if_made && !needs.logits_if_made)
                REQUIRE(same_live(with.live(), without.live()));
            first += count;
        }
    });
}

TEST_CASE("a known total and an unknown one keep the same rows", "[property]") {
    const std::size_t chunk = GENERATE(std::size_t{4}, 9, 20);
    for_every_policy([&](auto policy) {
        CAPTURE(policy.name, chunk);
        const TokenStream stream(small, tokens, 7);
        Evictor known(small, policy, Budget{.tokens = 9}), unknown(small, policy, Budget{.tokens = 9});
        Foreign a(small), b(small);
        known.begin_prompt(20);
        unknown.begin_prompt();
        in_chunks(20, chunk, [&](std::size_t first, std::size_t count) {
            feed(known, a, stream, first, count);
            feed(unknown, b, stream, first, count);
        });
        a.apply(known.end_prompt(a.view()));
        b.apply(unknown.end_prompt(b.view()));
        for (std::size_t token = 20; token < 30; ++token) {
            for (std::size_t i = 0; i < 4; ++i)
                REQUIRE(sorted(a.positions(i / 2, i % 2)) == sorted(b.positions(i / 2, i % 2)));
            REQUIRE(known.live().since == unknown.live().since);
            feed(known, a, stream, token, 1);
            feed(unknown, b, stream, token, 1);
        }
        if constexpr (!std::is_same_v<decltype(policy), Full>) REQUIRE(a.positions(0, 0).size() <= 9 + 3);
    });
    const TokenStream stream(small, tokens, 8);
    Evictor known(small, SnapKV{.window = 2}, Budget{.ratio = 0.4});
    Evictor unknown(small, SnapKV{.window = 2}, Budget{.ratio = 0.4});
    Foreign a(small), b(small);
    known.begin_prompt(15);
    unknown.begin_prompt();
    in_chunks(15, 6, [&](std::size_t first, std::size_t count) {
        feed(known, a, stream, first, count);
        feed(unknown, b, stream, first, count);
    });
    REQUIRE(a.positions(0, 0).size() == 6);
    REQUIRE(b.positions(0, 0).size() == 15);
    a.apply(known.end_prompt(a.view()));
    b.apply(unknown.end_prompt(b.view()));
    for (std::size_t i = 0; i < 4; ++i) REQUIRE(a.positions(i / 2, i % 2) == b.positions(i / 2, i % 2));
}

namespace {

struct ScopedTrim : TrimLike {
    static constexpr std::string_view name = "scoped_trim";
    Scope ranked = Scope::head;

    static constexpr auto fields() { return std::tuple{}; }
    [[nodiscard]] constexpr Scope scope() const { return ranked; }
};

}  // namespace

TEST_CASE("with slack, evictions come slack + 1 tokens apart", "[property]") {
    const std::size_t slack = GENERATE(std::size_t{0}, 1, 5);
    const Scope scope = GENERATE(Scope::head, Scope::layer_pooled, Scope::model_pooled);
    CAPTURE(slack, static_cast<int>(scope));
    const TokenStream stream(small, tokens, 9);
    const std::array log_beta{-1.0F, -2.0F};
    const auto run = [&](auto policy) {
        Evictor evictor(small, policy, Budget{.tokens = 8, .slack = slack});
        Foreign rows(small);
        std::size_t evictions = 0, total = 0, expected = 0;
        for (std::size_t token = 0; token < tokens; ++token) {
            const std::size_t before = total;
            for (std::size_t layer = 0; layer < 2; ++layer)
                evictor.admit(layer, 1, {.log_beta = {log_beta.data(), 2, 1}});
            feed(evictor, rows, stream, token, 1);
            total = 0;
            for (std::size_t i = 0; i < 4; ++i) total += rows.positions(i / 2, i % 2).size();
            evictions += total < before + 4 ? 1 : 0;
            expected = expected == 8 + slack ? 8 : expected + 1;
            REQUIRE(total == 4 * expected);
        }
        REQUIRE(evictions == (tokens - 8) / (slack + 1));
    };
    run(ScopedTrim{{}, scope});
}

TEST_CASE("sinks and recent rows of the budget stay under any policy", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 10);
        Evictor evictor(small, policy, Budget{.tokens = 10, .sinks = 3, .recent = 4});
        Foreign rows(small);
        evictor.begin_prompt(20);
        for (std::size_t first = 0; first < tokens;) {
            const std::size_t count = first < 20 ? 10 : 1;
            feed(evictor, rows, stream, first, count);
            first += count;
            if (first == 20) rows.apply(evictor.end_prompt(rows.view()));
            for (std::size_t i = 0; i < 4; ++i) {
                const auto held = sorted(rows.positions(i / 2, i % 2));
                const auto now = static_cast<position_t>(first);
                // Where both do not fit, the newest rows win.
                const auto recent = std::max<std::size_t>(4, protected_rows(policy, 10).recent);
                const auto sinks = static_cast<std::ptrdiff_t>(std::min<std::size_t>(3, 10 - recent));
                const std::vector<position_t> oldest{0, 1, 2};
                REQUIRE(std::equal(oldest.begin(), oldest.begin() + sinks, held.begin()));
                REQUIRE(std::vector(held.end() - 4, held.end()) ==
                        std::vector<position_t>{now - 4, now - 3, now - 2, now - 1});
            }
        }
    });
}

TEST_CASE("pinned positions stay for good", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 11);
        Evictor evictor(small, policy, Budget{.tokens = 9});
        Foreign rows(small);
        evictor.pin(2, 4);
        evictor.pin(9, 10);
        evictor.begin_prompt(16);
        for (std::size_t first = 0; first < tokens;) {
            const std::size_t count = first < 16 ? 8 : 1;
            feed(evictor, rows, stream, first, count);
            first += count;
            if (first == 16) rows.apply(evictor.end_prompt(rows.view()));
            for (std::size_t i = 0; i < 4; ++i) {
                const auto& held = rows.positions(i / 2, i % 2);
                for (const position_t pinned : {2, 3, 9})
                    if (static_cast<std::size_t>(pinned) < first)
                        REQUIRE(std::count(held.begin(), held.end(), pinned) == 1);
            }
        }
    });
}

TEST_CASE("positions may have gaps and go beyond 32 bits", "[property]") {
    // The position of token t; kept tokens are those that positions without gaps keep.
    const auto position_of = [](std::size_t t) {
        return static_cast<position_t>(t < 8 ? 3 * t : t + (position_t{1} << 33) * (t < 20 ? 1 : 5));
    };
    for_every_policy([&](auto policy) {
        using P = decltype(policy);
        if constexpr (std::is_same_v<P, Random> || std::is_same_v<P, SelfGated>) {
            return;  // draws, or counts ages, by position
        } else {
            if constexpr (std::is_same_v<P, H2O>)
                if (policy.by_queries) return;  // divides by age
            CAPTURE(policy.name);
            const TokenStream stream(small, tokens, 12);
            KVCache gaps(small, policy, Budget{.tokens = 9}), plain(small, policy, Budget{.tokens = 9});
            Evictor evictor(small, policy, Budget{.tokens = 9});
            Foreign rows(small);
            for (std::size_t first = 0; first < 30;) {
                const std::size_t count = first < 16 ? 8 : 1;
                std::vector<position_t> given;
                for (std::size_t t = first; t < first + count; ++t) given.push_back(position_of(t));
                Outputs out(small, count), foreign_out(small, count);
                for (std::size_t layer = 0; layer < 2; ++layer) {
                    const auto k = stream.k(layer, first, count), v = stream.v(layer, first, count);
                    gaps.append(layer, k, v, {.positions = given});
                    gaps.attend(layer, stream.q(layer, first, count), out.layer(layer));
                    rows.append(layer, k, v, given);
                    rows.apply(evictor.step(layer, rows.layer(layer), stream.q(layer, first, count),
                                            foreign_out.layer(layer)));
                }
                gaps.end_step();
                rows.apply(evictor.end_step(rows.view()));
                REQUIRE(same_bits(out.values, feed(plain, stream, first, count)));
                REQUIRE(same_bits(out.values, foreign_out.values));
                first += count;
                REQUIRE(gaps.seen() == first);
                REQUIRE(gaps.evictor().next_position() == position_of(first - 1) + 1);
                for (std::size_t i = 0; i < 4; ++i) {
                    std::vector<position_t> expected;
                    for (const position_t t : plain.positions(i / 2, i % 2))
                        expected.push_back(position_of(static_cast<std::size_t>(t)));
                    REQUIRE(gaps.positions(i / 2, i % 2) == expected);
                    REQUIRE(sorted(rows.positions(i / 2, i % 2)) == expected);
                }
            }
            // Without a list the next token follows the last one.
            feed(gaps, stream, 30, 1);
            if (protected_rows(policy, 9).recent > 0)  // else the newest token may lose
                REQUIRE(gaps.positions(0, 0).back() == position_of(29) + 1);
        }
    });
}

namespace {

/// `select` of the baselines' specification on entries in order of position.
std::vector<position_t> select_by_spec(const std::vector<std::pair<position_t, float>>& entries,
                                       std::size_t budget, std::size_t sinks, std::size_t recent) {
    const std::size_t n = entries.size();
    std::vector<position_t> kept;
    if (n <= budget) {
        for (const auto& [position, score] : entries) kept.push_back(position);
        return kept;
    }
    const std::size_t r = std::min(recent, budget), s = std::min(sinks, budget - r);
    std::vector<std::pair<float, position_t>> others;
    for (std::size_t j = 0; j < n; ++j) {
        if (j < s || j >= n - r)
            kept.push_back(entries[j].first);
        else
            others.emplace_back(entries[j].second, entries[j].first);
    }
    std::sort(others.begin(), others.end(), std::greater<>());
    for (std::size_t i = 0; i < budget - r - s; ++i) kept.push_back(others[i].second);
    return sorted(kept);
}

}  // namespace

TEST_CASE("make_room keeps what the specification says, before the tokens come", "[differential]") {
    const std::size_t budget = 9;
    const std::size_t coming = GENERATE(std::size_t{0}, 1, 3, 8, 9);
    const std::size_t held = GENERATE(std::size_t{4}, 9);
    for_every_policy([&](auto policy) {
        using P = decltype(policy);
        CAPTURE(policy.name, coming, held);
        if constexpr (!std::is_same_v<P, SnapKV>) {  // its votes are its own specification's
            const TokenStream stream(small, tokens, 13);
            Evictor evictor(small, policy, Budget{.tokens = budget});
            Foreign rows(small);
            feed(evictor, rows, stream, 0, held == 4 ? 4 : 12);
            feed(evictor, rows, stream, held == 4 ? 4 : 12, 1);
            std::vector<std::vector<position_t>> expected;
            for (std::size_t layer = 0; layer < 2; ++layer) {
                std::vector<std::vector<float>> score(2);
                for (std::size_t head = 0; head < 2; ++head) {
                    const HeadView view = rows.layer(layer)[head];
                    const Protected rule = protected_rows(policy, budget);
                    HeadStep step{.layer = layer,
                                  .head = head,
                                  .group = 2,
                                  .next_position = evictor.next_position(),
                                  .cached = view,
                                  .scale = small.logit_scale(),
                                  .protect = {rule.sinks, rule.recent - std::min(rule.recent, coming)},
                                  .kernels = &simd::kernels()};
                    Scratch<float> workspace, wrapper_workspace;
                    step.workspace = &workspace;
                    step.wrapper_workspace = &wrapper_workspace;
                    score[head].resize(view.rows());
                    if constexpr (SequenceState<P>)
                        policy.score(evictor.state(layer, head), evictor.live().sequence, step, score[head]);
                    else
                        policy.score(evictor.state(layer, head), step, score[head]);
                }
                if (scope_of(policy) == Scope::layer_shared)
                    for (std::size_t j = 0; j < score[0].size(); ++j)
                        score[0][j] = score[1][j] = (score[0][j] + score[1][j]) / 2;
                for (std::size_t head = 0; head < 2; ++head) {
                    std::vector<std::pair<position_t, float>> entries;
                    for (std::size_t j = 0; j < score[head].size(); ++j)
                        entries.emplace_back(rows.positions(layer, head)[j], score[head][j]);
                    std::sort(entries.begin(), entries.end());
                    const Protected rule = protected_rows(policy, budget);
                    const bool room = entries.size() + coming <= budget || std::is_same_v<P, Full>;
                    expected.push_back(select_by_spec(entries, room ? tokens : budget - coming, rule.sinks,
                                                      rule.recent - std::min(rule.recent, coming)));
                }
            }
            rows.apply(evictor.make_room(rows.view(), coming));
            for (std::size_t i = 0; i < 4; ++i) REQUIRE(sorted(rows.positions(i / 2, i % 2)) == expected[i]);
            if (coming == 0) return;
            const std::size_t before = rows.positions(0, 0).size();
            const std::size_t first = held == 4 ? 5 : 13;
            REQUIRE(evictor
                        .step(0,
                              (rows.append(0, stream.k(0, first, coming), stream.v(0, first, coming),
                                           evictor.next_position()),
                               rows.layer(0)),
                              stream.q(0, first, coming))
                        .empty());
            if (!std::is_same_v<P, Full>) REQUIRE(before + coming <= budget);
        }
    });
}

TEST_CASE("under hold nothing is evicted, and what was seen meanwhile counts afterwards", "[contract]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 14);
        Evictor evictor(small, policy, Budget{.tokens = 8}), free(small, policy, Budget{.tokens = 1000});
        Foreign rows(small), all(small);
        evictor.hold(true);
        evictor.begin_prompt(12);
        free.begin_prompt(12);
        for (std::size_t first = 0; first < 20;) {
            const std::size_t count = first == 0 ? 12 : 1;
            REQUIRE(
                same_bits(feed(evictor, rows, stream, first, count), feed(free, all, stream, first, count)));
            first += count;
            if (first != 12) continue;
            rows.apply(evictor.end_prompt(rows.view()));
            all.apply(free.end_prompt(all.view()));
        }
        REQUIRE(rows.positions(1, 1).size() == 20);
        for (std::size_t i = 0; i < 4; ++i)
            REQUIRE(same_bits(state_values(evictor.live().states[i]), state_values(free.live().states[i])));
        REQUIRE(failure<error::state_error>([&] { evictor.make_room(rows.view(), 1); }) ==
                "Evictor::make_room: hold is on, want off");
        evictor.hold(false);
        feed(evictor, rows, stream, 20, 1);
        const bool full = std::is_same_v<decltype(policy), Full>;
        REQUIRE(rows.positions(0, 0).size() == (full ? 21 : 8));
    });
}

TEST_CASE("truncate takes back the newest tokens, and the sequence goes on from there", "[contract]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 15);
        Evictor evictor(small, policy, Budget{.tokens = 12}), twin(small, policy, Budget{.tokens = 12});
        Foreign rows(small), twin_rows(small);
        feed(evictor, rows, stream, 0, 7);
        feed(twin, twin_rows, stream, 0, 7);
        feed(evictor, rows, stream, 20, 3);  // three tokens that will be taken back
        rows.apply(evictor.truncate(rows.view(), 3));
        REQUIRE(evictor.seen() == 7);
        REQUIRE(evictor.next_position() == 7);
        REQUIRE(evictor.live().since == twin.live().since);
        for (std::size_t i = 0; i < 4; ++i)
            REQUIRE(sorted(rows.positions(i / 2, i % 2)) == sorted(twin_rows.positions(i / 2, i % 2)));
        rows.apply(evictor.truncate(rows.view(), 0));
        REQUIRE(evictor.seen() == 7);
        // What the taken rows gave the others stays, so only policies without such a memory go on alike.
        const Needs needs = policy.needs(Phase::decode);
        if (!needs.attention || needs.rows != all_rows)
            for (std::size_t token = 7; token < 30; ++token) {
                REQUIRE(same_bits(feed(evictor, rows, stream, token, 1),
                                  feed(twin, twin_rows, stream, token, 1)));
                REQUIRE(rows.positions(1, 0) == twin_rows.positions(1, 0));
            }
        rows.apply(evictor.truncate(rows.view(), evictor.seen()));
        REQUIRE(rows.positions(0, 0).empty());
        REQUIRE(evictor.next_position() == 0);
    });
}

TEST_CASE("taking tokens back is no eviction: an interval goes on counting", "[contract]") {
    const TokenStream stream(small, tokens, 16);
    Evictor evictor(small, SnapKV{.window = 2, .decode_interval = 4}, Budget{.tokens = 8});
    Foreign rows(small);
    evictor.begin_prompt();
    feed(evictor, rows, stream, 0, 12);
    rows.apply(evictor.end_prompt(rows.view()));
    std::size_t most = 0;
    for (std::size_t token = 12; token < 30; ++token) {  // each time one more is tried and taken back
        feed(evictor, rows, stream, token, 2);
        rows.apply(evictor.truncate(rows.view(), 1));
        most = std::max(most, rows.positions(0, 0).size());
    }
    REQUIRE(most == 10);  // four tokens after the last eviction, and one of them taken back
}

TEST_CASE("a second turn's prompt is decided like the first", "[contract]") {
    const TokenStream stream(small, 80, 17);
    SECTION("at its end") {
        for (const bool known : {true, false}) {
            Evictor evictor(small, SnapKV{.window = 3}, Budget{.tokens = 8});
            Foreign rows(small);
            std::size_t first = 0;
            for (const std::size_t turn : {14U, 3U, 11U}) {
                evictor.begin_prompt(known ? std::optional<std::size_t>(turn) : std::nullopt);
                for (std::size_t i = 0; i < turn; ++i) feed(evictor, rows, stream, first++, 1);
                REQUIRE(rows.positions(0, 0).size() == (known ? 8 : (first == 14 ? 14 : 10 + turn)));
                rows.apply(evictor.end_prompt(rows.view()));
                REQUIRE(rows.positions(0, 0).size() == 8);
                for (std::size_t i = 0; i < 2; ++i) feed(evictor, rows, stream, first++, 1);
                REQUIRE(rows.positions(0, 0).size() == 10);
            }
        }
    }
    SECTION("with a ratio of all tokens seen") {
        Evictor evictor(small, H2O{}, Budget{.ratio = 0.5});
        Foreign rows(small);
        evictor.begin_prompt(12);
        feed(evictor, rows, stream, 0, 12);
        rows.apply(evictor.end_prompt(rows.view()));
        feed(evictor, rows, stream, 12, 1);
        REQUIRE(rows.positions(0, 0).size() == 6);
        evictor.begin_prompt(7);  // 20 by its end
        REQUIRE(evictor.size(0, 0) == 10);
        feed(evictor, rows, stream, 13, 7);
        rows.apply(evictor.end_prompt(rows.view()));
        REQUIRE(rows.positions(0, 0).size() == 10);
    }
    SECTION("an empty one") {
        Evictor evictor(small, H2O{}, Budget{.tokens = 4});
        Foreign rows(small);
        evictor.begin_prompt(0);
        REQUIRE(evictor.end_prompt(rows.view()).empty());
        feed(evictor, rows, stream, 0, 6);
        evictor.begin_prompt();
        REQUIRE(evictor.end_prompt(rows.view()).empty());
        REQUIRE(rows.positions(0, 0).size() == 4);
    }
}

TEST_CASE("rows stay ascending for an engine that asks for it", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 18);
        Evictor fill(small, policy, Budget{.tokens = 8}), ascending(small, policy, Budget{.tokens = 8});
        REQUIRE(fill.compaction(0) == (is_ordered(policy) ? Compaction::ascending : Compaction::fill));
        ascending.keep_ascending();
        REQUIRE(ascending.compaction(0) == Compaction::ascending);
        Foreign a(small), b(small);
        for (std::size_t first = 0; first < 30;) {
            const std::size_t count = first == 0 ? 14 : 1;
            feed(fill, a, stream, first, count);
            feed(ascending, b, stream, first, count);
            for (std::size_t i = 0; i < 4; ++i) {
                const auto& held = b.positions(i / 2, i % 2);
                REQUIRE(std::is_sorted(held.begin(), held.end()));
                // Sums of the other order may differ in their last bits, so only exact scores are compared.
                if constexpr (std::is_same_v<decltype(policy), Random> ||
                              std::is_same_v<decltype(policy), Streaming>)
                    REQUIRE(held == sorted(a.positions(i / 2, i % 2)));
            }
            first += count;
        }
    });
}

TEST_CASE("a proposal changes nothing and is what a decision of that size does", "[property]") {
    for_every_policy([](auto policy) {
        CAPTURE(policy.name);
        const TokenStream stream(small, tokens, 19);
        Evictor evictor(small, policy, Budget{.tokens = 14});
        Foreign rows(small);
        feed(evictor, rows, stream, 0, 12);
        Evictor before = evictor;
        const CacheView held = rows.view();
        for (std::size_t i = 0; i < 4; ++i) {  // what is prepared for scores may be remembered
            std::vector<float> scores(held.heads[i].rows());
            before.scores(i / 2, i % 2, held.heads[i], scores);
        }
        Foreign copy = rows;
        copy.apply(evictor.propose(rows.view(), 8));
        REQUIRE(same_live(evictor.live(), before.live()));
        for (std::size_t i = 0; i < 4; ++i) REQUIRE(copy.positions(i / 2, i % 2).size() == 8);
        REQUIRE(evictor.propose(rows.view(), 12).empty());
        Foreign none = rows;
        none.apply(evictor.propose(rows.view(), 0));
        REQUIRE(none.positions(1, 1).empty());
        if constexpr (!std::is_same_v<decltype(policy), Full>) {
            Evictor small_one(small, policy, Budget{.tokens = 8});
            small_one.restore(before.live());
            Live<decltype(policy)> live = before.live();
            std::fill(live.sizes.begin(), live.sizes.end(), std::size_t{8});
            small_one.restore(std::move(live));
            Foreign same = rows;
            same.apply(small_one.make_room(same.view(), 0));
            for (std::size_t i = 0; i < 4; ++i)
                REQUIRE(same.positions(i / 2, i % 2) == copy.positions(i / 2, i % 2));
        }
    });
}

TEST_CASE("heads on threads give the bits of heads in turn", "[threads][differential]") {
    const CacheShape shape{.layers = 2, .q_heads = 8, .kv_heads = 4, .head_dim = 8};
    const auto run = [&](auto policy) {
        const TokenStream stream(shape, tokens, 20);
        Evictor serial(shape, policy, Budget{.tokens = 9}), parallel(shape, policy, Budget{.tokens = 9});
        parallel.set_executor(threads());
        Foreign a(shape), b(shape);
        serial.begin_prompt(17);
        parallel.begin_prompt(17);
        in_chunks(17, 9, [&](std::size_t first, std::size_t count) {
            REQUIRE(
                same_bits(feed(serial, a, stream, first, count), feed(parallel, b, stream, first, count)));
        });
        a.apply(serial.end_prompt(a.view()));
        b.apply(parallel.end_prompt(b.view()));
        for (std::size_t token = 17; token < 24; ++token)
            REQUIRE(same_bits(feed(serial, a, stream, token, 1), feed(parallel, b, stream, token, 1)));
        for (std::size_t layer = 0; layer < 2; ++layer) {
            Outputs x(shape, 3), y(shape, 3);
            const auto q = stream.q(layer, 30, 3), k = stream.k(layer, 30, 3), v = stream.v(layer, 30, 3);
            a.apply(serial.probe(layer, a.layer(layer), q, k, v, x.layer(layer)));
            b.apply(parallel.probe(layer, b.layer(layer), q, k, v, y.layer(layer)));
            REQUIRE(same_bits(x.values, y.values));
        }
        a.apply(serial.make_room(a.view(), 2));
        b.apply(parallel.make_room(b.view(), 2));
        REQUIRE(same_live(serial.live(), parallel.live()));
        for (std::size_t i = 0; i < shape.heads(); ++i)
            REQUIRE(a.positions(i / 4, i % 4) == b.positions(i / 4, i % 4));
    };
    for_every_policy(run);
    run(EpiLike{});
}
