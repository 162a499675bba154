#pragma once
/// All methods, a line each.

#include "policies/caote.hpp"
#include "policies/critical.hpp"
#include "policies/epicache.hpp"
#include "policies/h2o.hpp"
#include "policies/keydiff.hpp"
#include "policies/laq.hpp"
#include "policies/obcache.hpp"
#include "policies/rkv.hpp"
#include "policies/skipkv.hpp"
#include "policies/snapkv.hpp"
#include "policies/streaming.hpp"
#include "policies/trimkv.hpp"
