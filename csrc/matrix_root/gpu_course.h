// The course of a matrix through coupled Newton: which operation follows which. One thread of the block that ends an
// operation decides.
#pragma once

#include "common/gpu.h"
#include "matrix_root/gpu_roots.h"

namespace stepladder::matrix_root {

// The largest power of two that is at most x; 0 for 0.
SL_HD double power_of_two(double x) {
  const double up = 18446744073709551616.0;  // 2^64
  const bool subnormal = x < 2.2250738585072014e-308;
  const double power = bit_cast<double>(bit_cast<uint64_t>(subnormal ? x * up : x) & 0x7ff0000000000000ull);
  return subnormal ? power / up : power;
}

// x^(-1/p) for p in 1, 2, 4.
SL_HD double inverse_root(double x, int p) { return 1.0 / (p == 1 ? x : p == 2 ? sqrt(x) : sqrt(sqrt(x))); }

// What the result is multiplied by.
SL_HD double result_factor(const Options& options, const RootState& s) {
  return inverse_root(s.scale, options.p) * inverse_root(s.unit, options.p);
}

// A squaring of what is in `from`.
SL_DEVICE void square(RootState& s, int from, int to, double alpha) {
  s.operation = {from, from, -1, to, -1, alpha, 0.0, 0.0, 0.0, 0.0, 0.0};
  s.position = Position::square;
}

SL_DEVICE void begin_attempt(RootState& s, Phase phase) {
  s.phase = phase;
  s.m = 0;
  s.t = 1;
  s.a = 2;
  s.b = 3;
  s.x = s.nearest = -1;
  s.newton = 0;
  s.best = INFINITY;
  s.last = false;
  square(s, s.m, s.a, 1.0);
}

// Once the largest eigenvalue of A / top_unit is known, if it matters: in fp32 where its error allows for matrices of
// this size.
SL_DEVICE void begin_first_attempt(const Options& options, int64_t n, double top, RootState& s) {
  if (top != 0.0) s.delta += options.relative_eps * (top * s.top_unit / s.unit);
  const bool fast = sqrt(static_cast<double>(n)) / options.p <= options.fast_size;
  begin_attempt(s, fast ? Phase::fast : Phase::wide);
}

// Of a matrix whose largest magnitude is `largest`.
SL_DEVICE void begin_course(const Options& options, int64_t n, double largest, RootState& s) {
  s.ticket = s.steps = s.squarings = 0;
  s.scale = s.unit = s.top_unit = 1.0;
  s.phase = Phase::nothing;
  s.status = kNonFinite;
  if (!(largest - largest == 0.0)) return;
  s.status = kFailed;
  s.unit = power_of_two(largest > options.eps ? largest : options.eps);
  if (s.unit == 0.0) return;
  s.delta = options.eps / s.unit;
  if (options.relative_eps == 0.0 || largest == 0.0) return begin_first_attempt(options, n, 0.0, s);
  s.top_unit = power_of_two(largest);
  begin_attempt(s, Phase::top);
}

// The last of the polynomials that allow for a matrix of at most this condition.
SL_HD int first_start(const Attempt& attempt, double known) {
  int first = 0;
  for (int i = 0; i < attempt.num_starts; ++i)
    if (attempt.starts[i].condition >= known) first = i;
  return first;
}

// s = sqrt of the norm of D^2, at least the largest eigenvalue.
SL_HD double scale_of(double sum_of_squares) { return sqrt(sqrt(sum_of_squares)) * (1.0 + 1.0 / 1024.0); }
SL_HD double known_condition(const RootState& s) { return s.delta > 0.0 ? s.scale / s.delta : INFINITY; }

// What is to be done with an M at this distance from I, and notes it.
enum class Verdict { end, step, last_step };
SL_DEVICE Verdict judge(const Options& options, const Attempt& attempt, double distance, RootState& s, bool* nearer) {
  *nearer = false;
  if (s.newton == attempt.newton_steps || !(distance <= options.growth * s.best)) return Verdict::end;
  *nearer = distance < s.best;
  if (*nearer) s.best = distance;
  ++s.newton;
  ++s.steps;
  if (distance <= options.near) return Verdict::last_step;
  // What a step beyond the last makes is never looked at.
  return s.newton == attempt.newton_steps ? Verdict::end : Verdict::step;
}

SL_HD Status ending(const Options& options, double best) {
  return best <= options.near ? kConverged : best < 1.0 ? kStalled : kFailed;
}

// An attempt has ended: in fp32, whatever did not converge is tried again.
SL_DEVICE void end_attempt(const Options& options, RootState& s) {
  s.status = ending(options, s.best);
  const bool fast = s.phase == Phase::fast;
  if (s.status == kConverged || (!fast && s.status == kStalled)) {
    s.phase = fast ? Phase::fast_done : Phase::wide_done;
  } else if (fast) {
    begin_attempt(s, Phase::wide);
  } else {
    s.phase = Phase::nothing;
  }
}

SL_DEVICE void exchange(int32_t& left, int32_t& right) {
  const int32_t kept = left;
  left = right;
  right = kept;
}

// To a buffer that is neither X nor the nearest.
SL_DEVICE void multiply_x(RootState& s) {
  int out = kNumSquares;
  while (out == s.x || out == s.nearest) ++out;
  s.operation = {s.x, s.t, -1, out, -1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0};
  s.position = Position::multiply;
}

// M <- T^p M, of T^p in `power`. Where a Newton step follows, its T = ((p + 1)I - M)/p goes to a buffer that nobody
// reads meanwhile.
SL_DEVICE void update_m(const Options& options, const Attempt& attempt, RootState& s, int power) {
  const int out = power == s.a ? s.b : s.a, spare = power == s.t ? s.b : s.t;
  const bool newton = s.start + 1 == attempt.num_starts;
  const double p = options.p;
  const double alpha = s.fresh ? 1.0 / s.scale : 1.0;
  s.operation = {power, s.m, -1, out, newton ? spare : -1, alpha, 0.0, 0.0, -1.0 / p, (p + 1.0) / p, 1.0};
  s.position = Position::update;
}

SL_DEVICE void after_t(const Options& options, const Attempt& attempt, RootState& s) {
  if (options.p == 1) return update_m(options, attempt, s, s.t);
  square(s, s.t, s.a, 1.0);
  s.position = Position::power2;
}

SL_DEVICE void after_update(const Options& options, const Attempt& attempt, RootState& s, double sum) {
  const int32_t out = s.operation.out, also = s.operation.also;
  exchange(s.m, out == s.a ? s.a : s.b);
  if (also == s.b) exchange(s.t, s.b);
  s.fresh = false;
  if (s.start + 1 < attempt.num_starts) {
    const Start& start = attempt.starts[++s.start];
    ++s.steps;
    s.operation = {s.m, s.m, s.m, s.t, -1, start.c, start.b, start.a, 0.0, 0.0, 0.0};
    s.position = Position::start;
    return;
  }
  bool nearer;
  const Verdict verdict = judge(options, attempt, sqrt(sum), s, &nearer);
  if (nearer) s.nearest = s.x;
  s.last = verdict == Verdict::last_step;
  if (verdict == Verdict::end) return end_attempt(options, s);
  multiply_x(s);
}

// An operation has ended, and `sum` is what it summed: sets the next.
SL_DEVICE void advance(const Options& options, RootState& s, double sum) {
  if (s.phase == Phase::top) {
    const int from = s.operation.out;
    if (++s.squarings == options.squarings) {
      s.phase = Phase::top_squared;
    } else {
      square(s, from, from == s.a ? s.t : s.a, 1.0 / sum);
    }
    return;
  }
  const Attempt& attempt = s.phase == Phase::fast ? options.fast : options.wide;
  switch (s.position) {
    case Position::square: {
      s.scale = scale_of(sum);
      s.start = first_start(attempt, known_condition(s));
      s.fresh = true;
      ++s.steps;
      s.x = kNumSquares;
      const Start& start = attempt.starts[s.start];
      const double c = start.c / s.scale / s.scale, b = start.b / s.scale;
      s.operation = {-1, s.a, s.m, s.t, s.x, c, b, start.a, 1.0, 0.0, 0.0};
      s.position = Position::first;
      return;
    }
    case Position::first: return after_t(options, attempt, s);
    case Position::start: return multiply_x(s);
    case Position::multiply:
      s.x = s.operation.out;
      if (!s.last) return after_t(options, attempt, s);
      s.nearest = s.x;
      return end_attempt(options, s);
    case Position::power2:
      if (options.p == 2) return update_m(options, attempt, s, s.a);
      square(s, s.a, s.b, 1.0);
      s.position = Position::power4;
      return;
    case Position::power4: return update_m(options, attempt, s, s.b);
    case Position::update: return after_update(options, attempt, s, sum);
  }
}

}  // namespace stepladder::matrix_root
