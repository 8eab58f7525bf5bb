// All rule headers, and the numbering that rules.def gives them.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamw.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"
#include "rules/signsgd.h"

namespace stepladder {

enum class Rule : int {
#define SL_RULE(name, ...) name,
#define SL_NORM_RULE(name, ...) name,
#include "rules/rules.def"
  count
};

constexpr int kNumRules = static_cast<int>(Rule::count);
constexpr int kMaxStates = 3;
constexpr int kMaxHyper = 5;

}  // namespace stepladder
