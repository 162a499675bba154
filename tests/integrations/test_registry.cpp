#include "kvcull/integrations/registry.hpp"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "kvcull/policies.hpp"
#include "kvcull/select/head_rules.hpp"
#include "kvcull/select/layer_rules.hpp"
#include "support/catch.hpp"
#include "support/failure.hpp"
#include "support/reference.hpp"

using namespace kvcull;

namespace {

/// What with_policy finds in `text`, as a P.
template <class P>
P found(std::string_view text) {
    P result{};
    bool right = false;
    with_policy<Full, Streaming, Random, H2O, Tova, KeyDiff, KeyNorm, Vatp, SnapKV, RKV, SkipKV<>, OBCache,
                Caote<>, FastCaote<>>(text, [&](const auto& policy) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(policy)>, P>) {
            result = policy;
            right = true;
        }
    });
    CHECK(right);
    return result;
}
std::string refusal(std::string_view text) {
    try {
        with_policy<Full, H2O, Tova, SnapKV, SkipKV<>, Caote<>>(
            text, [](const auto& /*policy*/) { FAIL("accepted"); });
    } catch (const error::config_error& error) {
        return error.what();
    }
    return "nothing was thrown";
}

bool mentions(const std::string& text, std::initializer_list<std::string_view> words) {
    return std::all_of(words.begin(), words.end(),
                       [&](std::string_view word) { return text.find(word) != std::string::npos; });
}

}  // namespace

TEST_CASE("a name alone is the policy with its defaults", "[contract]") {
    const SnapKV snapkv = found<SnapKV>("snapkv");
    CHECK(snapkv.window == SnapKV{}.window);
    CHECK(snapkv.pool == Pool::max);
    CHECK_FALSE(found<H2O>("h2o").recent.has_value());
    (void)found<Full>("full");
    (void)found<H2O>("h2o:");
}

TEST_CASE("every field of every policy can be set by name", "[contract]") {
    const H2O h2o = found<H2O>("h2o:recent=7,sinks=2,window=9,by_queries=true,kernel=5,pool=avg");
    CHECK((h2o.recent == 7 && h2o.sinks == 2 && h2o.window == 9 && h2o.by_queries && h2o.kernel == 5 &&
           h2o.pool == Pool::avg));
    const Tova tova = found<Tova>("tova:scope=kv_head,protect_newest=1,sinks=3,recent=4,kernel=3,pool=max");
    CHECK((tova.share == Tova::Share::kv_head && tova.protect_newest && tova.sinks == 3 && tova.recent == 4));
    CHECK((tova.kernel == 3 && tova.pool == Pool::max));
    const SnapKV snapkv =
        found<SnapKV>("snapkv:window=16,kernel=5,pool=none,gqa=sum,sinks=4,decode_interval=8");
    CHECK(
        (snapkv.window == 16 && snapkv.kernel == 5 && snapkv.pool == Pool::none && snapkv.gqa == Group::sum));
    CHECK((snapkv.sinks == 4 && snapkv.decode_interval == 8));
    const Vatp vatp = found<Vatp>("vatp:recent=1,sinks=2,window=3,kernel=7,pool=max");
    CHECK((vatp.recent == 1 && vatp.sinks == 2 && vatp.window == 3 && vatp.kernel == 7 &&
           vatp.pool == Pool::max));
    const KeyNorm keynorm = found<KeyNorm>("keynorm:sinks=1,recent=2,skip_layers=2,prune_after=2048");
    CHECK((keynorm.sinks == 1 && keynorm.recent == 2 && keynorm.skip_layers == 2 &&
           keynorm.prune_after == 2048));
    CHECK(found<KeyDiff>("keydiff:recent=5").recent == 5);
    CHECK(found<Streaming>("streaming:sinks=8").sinks == 8);
    CHECK(found<Random>("random:seed=42").seed == 42);
    CHECK_FALSE(found<H2O>("h2o:by_queries=false").by_queries);
    const RKV rkv = found<RKV>("rkv:window=4,interval=9,kernel=5,sigma=0.25,key_threshold=-0.5,retain=first");
    CHECK((rkv.window == 4 && rkv.interval == 9 && rkv.kernel == 5 && rkv.retain == Retain::first));
    CHECK((test::same_bits(rkv.sigma, 0.25F) && test::same_bits(rkv.key_threshold, -0.5F)));
    const SkipKV<> skip = found<SkipKV<>>(
        "skipkv:interval=9,delimiters=2+3,markers=6,tau=0.5,merge=false,min_sentence_tokens=3,"
        "compare_interval=7,rescale=true");
    CHECK((skip.interval == 9 && skip.compare_interval == 7 && skip.rescale));
    CHECK((skip.sentences.delimiters.contains(3) && skip.sentences.markers.contains(6)));
    CHECK((!skip.sentences.merge && skip.sentences.min_sentence_tokens == 3));
    CHECK(test::same_bits(skip.sentences.tau, 0.5F));
    const OBCache obcache = found<OBCache>(
        "obcache:score=joint,base=tova,recent=3,sinks=4,window=1,kernel=5,pool=avg,decode_evict=false,"
        "norms=recomputed,lagged=true");
    CHECK((obcache.kind == OBCache::Score::joint && obcache.base == OBCache::Base::tova));
    CHECK((obcache.recent == 3 && obcache.sinks == 4 && obcache.window == 1 && obcache.kernel == 5));
    CHECK((obcache.pool == Pool::avg && !obcache.decode_evict && obcache.lagged));
    CHECK(obcache.norms == OBCache::Norms::recomputed);
    CHECK_FALSE(found<OBCache>("obcache:score=value_l1").recent.has_value());
}

TEST_CASE("the parameters of a policy inside a policy are set by their own names", "[contract]") {
    const Caote<> caote = found<Caote<>>("caote:base=h2o,fast=true,gqa=mean,order=greedy,recent=5,window=9");
    CHECK((caote.base.base == PerHeadAttention::Rows::h2o && caote.base.recent == 5));
    CHECK((caote.base.window == 9 && caote.fast && caote.gqa == Caote<>::Gqa::mean));
    CHECK(caote.order == Caote<>::Order::greedy);
    CHECK_FALSE(found<Caote<>>("caote:base=tova").gqa.has_value());
    const FastCaote<> fast = found<FastCaote<>>("fastcaote:base=h2o,order=greedy");
    CHECK((fast.fast && fast.base.base == PerHeadAttention::Rows::h2o));
    CHECK(mentions(refusal("caote:bias=1"), {"bias", "fast", "gqa", "order", "base", "recent", "kernel"}));
    CHECK(mentions(refusal("caote:base=h20"), {"h20", "tova, h2o, snapkv"}));
    CHECK(mentions(refusal("caote:order=random"), {"random", "single, greedy"}));
    with_policy<Caote<SnapKV>>("caote:fast=true,decode_interval=7", [](const auto& policy) {
        CHECK(policy.fast);
        CHECK(policy.base.decode_interval == 7);
    });
}

TEST_CASE("what is not known is refused with a list of what is", "[contract]") {
    CHECK(mentions(refusal("laq"), {"laq", "full, h2o, tova, snapkv, skipkv, caote"}));
    CHECK(mentions(refusal(""), {"one of full"}));
    CHECK(mentions(refusal("snapkv:windw=3"), {"windw", "window", "decode_interval"}));
    CHECK(mentions(refusal("snapkv:pool=median"), {"median", "none, max, avg"}));
    CHECK(mentions(refusal("snapkv:window=-3"), {"window", "-3"}));
    CHECK(mentions(refusal("snapkv:window=3x"), {"3x"}));
    CHECK(mentions(refusal("snapkv:window="), {"window"}));
    CHECK(mentions(refusal("skipkv:delimiters=2;3"), {"delimiters", "2;3", "2+3+4"}));
    CHECK(mentions(refusal("snapkv:window"), {"key=value"}));
    CHECK(mentions(refusal("h2o:by_queries=maybe"), {"maybe", "true or false"}));
    CHECK(mentions(refusal("h2o:recent=99999999999999999999999"), {"recent"}));
    CHECK(mentions(refusal("full:sinks=4"), {"sinks", "no parameters"}));
    CHECK(mentions(refusal("H2O"), {"H2O"}));
    CHECK(mentions(refusal("snapkv:window=3,window=4"), {"window", "given twice"}));
    CHECK(mentions(refusal("snapkv:window=3,"), {"\"\"", "key=value"}));
    CHECK(mentions(refusal("snapkv:,window=3"), {"\"\"", "key=value"}));
}

TEST_CASE("budget rules are chosen by name as policies are", "[contract]") {
    const auto choose = [](std::string_view text, const auto& use) {
        with_rule<Uniform, Pyramid, AdaKV<>, AdaKV<Pyramid>>(text, use);
    };
    choose("ada_pyramid:alpha_permille=500,beta=7,mode=floor_fill,rounding=authors", [](const auto& rule) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(rule)>, AdaKV<Pyramid>>) {
            CHECK(rule.alpha_permille == 500);
            CHECK(rule.mode == AdaMode::floor_fill);
            CHECK(rule.head_rounding == Rounding::exact);
            CHECK(rule.layers.beta == 7);
            CHECK(rule.layers.rounding == Rounding::authors);
        } else {
            FAIL("another rule");
        }
    });
    const auto refusal = [&](std::string_view text) {
        return test::failure<error::config_error>(
            [&] { choose(text, [](const auto&) { FAIL("accepted"); }); });
    };
    CHECK(refusal("piramid") ==
          "with_rule: rule is \"piramid\", want one of uniform, pyramid, ada, ada_pyramid");
    CHECK(refusal("uniform:beta=1") == "uniform: parameter is \"beta\", want nothing: it has no parameters");
    CHECK(refusal("pyramid:slope=1") == "pyramid: parameter is \"slope\", want one of beta, rounding");
}
