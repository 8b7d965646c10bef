#include "core/dispatch.h"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "core/environment.h"
#include "core/registry.h"

namespace fa::core {
namespace {

struct CacheKey {
  AttentionProblem problem;
  Device device;
  std::string forced;
  bool operator==(const CacheKey&) const = default;
};

struct CacheKeyHash {
  size_t operator()(const CacheKey& key) const {
    const size_t device = static_cast<size_t>(key.device.type) * 64 + key.device.index;
    return AttentionProblemHash{}(key.problem) ^ (device * 0x9E3779B97F4A7C15) ^
           std::hash<std::string>{}(key.forced);
  }
};

// Bounded, so that a program that meets a new shape at every call does not grow.
constexpr size_t kMaxCachedPlans = 1024;

class PlanCache {
 public:
  std::optional<Choice> find(const CacheKey& key) {
    const std::lock_guard lock(mutex_);
    const auto found = plans_.find(key);
    if (found == plans_.end()) return std::nullopt;
    return found->second;
  }

  void insert(CacheKey key, Choice choice) {
    const std::lock_guard lock(mutex_);
    if (plans_.size() >= kMaxCachedPlans) plans_.clear();
    plans_.emplace(std::move(key), std::move(choice));
  }

 private:
  std::mutex mutex_;
  std::unordered_map<CacheKey, Choice, CacheKeyHash> plans_;
};

PlanCache& plan_cache() {
  static PlanCache cache;
  return cache;
}

// "cpu" names the family of "cpu:avx2"; "" names everything.
bool names(std::string_view forced, std::string_view implementation) {
  if (forced.empty() || forced == implementation) return true;
  return implementation.starts_with(forced) && implementation.substr(forced.size())[0] == ':';
}

std::string list_names(std::span<const Implementation> list) {
  std::string text;
  for (const Implementation& it : list) text += concat(text.empty() ? "" : ", ", it.name);
  return text.empty() ? "none" : text;
}

Result<Choice> choose_uncached(const AttentionProblem& problem, Device device,
                               std::string_view forced) {
  FA_TRY(check_forced(device, forced));
  const auto list = implementations(device.type);
  std::string refusals;
  for (const Implementation& implementation : list) {
    if (!names(forced, implementation.name)) continue;
    Result<PlanPtr> plan = implementation.accept(problem, device);
    if (plan.ok()) return Choice{implementation.name, plan.value()};
    refusals += concat("\n  ", implementation.name, ": ", plan.status().message());
  }
  return unsupported("no implementation on ", name(device), " takes this problem (",
                     to_string(problem), "):", refusals.empty() ? " none is registered" : refusals);
}

}  // namespace

Status check_forced(Device device, std::string_view forced) {
  const auto list = implementations(device.type);
  const auto is_meant = [&](const Implementation& it) { return names(forced, it.name); };
  if (forced.empty() || std::any_of(list.begin(), list.end(), is_meant)) return {};
  return invalid_argument("backend: '", forced,
                          "' (by argument or FLASH_ATTENTION_BACKEND) is not a backend for ",
                          name(device), "; known here: ", list_names(list));
}

Result<Choice> choose(const AttentionProblem& problem, Device device, std::string_view forced) {
  if (environment::verbose_dispatch()) {
    std::fprintf(stderr, "flash_attn dispatch: %s on %s\n%s", to_string(problem).c_str(),
                 name(device).c_str(), to_string(explain(problem, device, forced)).c_str());
  }
  CacheKey key{problem, device, std::string{forced}};
  if (std::optional<Choice> cached = plan_cache().find(key)) return *cached;
  Result<Choice> choice = choose_uncached(problem, device, forced);
  if (choice.ok()) plan_cache().insert(std::move(key), choice.value());
  return choice;
}

std::vector<Candidate> explain(const AttentionProblem& problem, Device device,
                               std::string_view forced) {
  using Outcome = Candidate::Outcome;
  std::vector<Candidate> candidates;
  bool chosen = false;
  for (const Implementation& implementation : implementations(device.type)) {
    if (!names(forced, implementation.name)) {
      candidates.push_back(
          {implementation.name, Outcome::kExcluded, concat("backend '", forced, "' is forced")});
      continue;
    }
    const Result<PlanPtr> plan = implementation.accept(problem, device);
    if (!plan.ok()) {
      candidates.push_back({implementation.name, Outcome::kRefused, plan.status().message()});
    } else if (!chosen) {
      const std::string what = plan.value()->describe();
      candidates.push_back({implementation.name, Outcome::kChosen,
                            concat("first that accepts", what.empty() ? "" : ": ", what)});
      chosen = true;
    } else {
      candidates.push_back({implementation.name, Outcome::kAccepts, "a better one comes first"});
    }
  }
  return candidates;
}

std::string to_string(const std::vector<Candidate>& candidates) {
  constexpr const char* kOutcomes[] = {"chosen  ", "accepts ", "refused ", "excluded"};
  std::string text;
  for (const Candidate& candidate : candidates) {
    std::string padded = candidate.implementation;
    padded.resize(std::max<size_t>(padded.size(), 15), ' ');
    text += concat("  ", padded, " ", kOutcomes[static_cast<int>(candidate.outcome)], " ",
                   candidate.reason, "\n");
  }
  return text;
}

}  // namespace fa::core
