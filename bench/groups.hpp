#pragma once
/// The groups of cases, each in a file of its own.

namespace kvcull::bench {

void add_attention();   // decode/.. and prefill/..
void add_selection();   // select/..
void add_policies();    // policy/..
void add_cache();       // cache/..
void add_redundancy();  // redundancy/.. and sentences/..
void add_paging();      // paging/..
void add_lookahead();   // lookahead/..
void add_episodes();    // episodes/..
void add_gates();       // gate/..
void add_views();       // views/..

}  // namespace kvcull::bench
