#pragma once
/// Everything but integrations of other people's types (integrations/eigen.hpp): policies, evictor, cache,
/// and the run-time choice of a policy.

#include "attention/rope.hpp"
#include "base/safetensors.hpp"
#include "cache/evictor.hpp"
#include "cache/kv_cache.hpp"
#include "cache/lookahead.hpp"
#include "integrations/registry.hpp"
#include "paging/file_store.hpp"
#include "paging/guard.hpp"
#include "paging/memory_store.hpp"
#include "paging/quest.hpp"
#include "paging/tier.hpp"
#include "policies.hpp"
#include "select/budget.hpp"
#include "select/executors.hpp"
#include "select/cluster.hpp"
#include "select/head_rules.hpp"
#include "select/layer_rules.hpp"
#include "select/reduce.hpp"
