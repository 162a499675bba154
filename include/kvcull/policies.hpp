#pragma once
/// All methods, a line each.

#include "policies/h2o.hpp"
#include "policies/keydiff.hpp"
#include "policies/snapkv.hpp"
#include "policies/streaming.hpp"
