// Linked into every test: a header that defines something without `inline` breaks the link of all of them.
#include <kvcull/kvcull.hpp>
