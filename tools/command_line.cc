#include "command_line.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <numeric>

namespace fa::tools {
namespace {

template <class T>
bool parse_number(const std::string& text, T* value) {
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, *value);
  return result.ec == std::errc{} && result.ptr == end;
}

std::string join(const std::vector<std::string>& words, const char* between) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

// How many letters must be changed, added or taken away (Levenshtein).
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

CommandLine::CommandLine(std::string name, std::string summary)
    : name_(std::move(name)), summary_(std::move(summary)) {}

void CommandLine::flag(const char* name, bool* value, const char* help) {
  flags_.push_back({name, "", "", help, [value](const std::string&) { return *value = true; }});
}

void CommandLine::option(const char* name, const char* placeholder, int64_t* value,
                         const char* help) {
  flags_.push_back({name, placeholder, "a whole number", help,
                    [value](const std::string& text) { return parse_number(text, value); }});
}

void CommandLine::option(const char* name, const char* placeholder, double* value,
                         const char* help) {
  flags_.push_back({name, placeholder, "a number", help,
                    [value](const std::string& text) { return parse_number(text, value); }});
}

void CommandLine::option(const char* name, const char* placeholder, std::string* value,
                         const char* help) {
  flags_.push_back({name, placeholder, "text", help, [value](const std::string& text) {
                      *value = text;
                      return true;
                    }});
}

void CommandLine::option(const char* name, const char* placeholder, std::optional<double>* value,
                         const char* help) {
  flags_.push_back({name, placeholder, "a number", help, [value](const std::string& text) {
                      double number = 0.0;
                      if (!parse_number(text, &number)) return false;
                      *value = number;
                      return true;
                    }});
}

void CommandLine::choice(const char* name, std::vector<std::string> choices, std::string* value,
                         const char* help) {
  const std::string placeholder = join(choices, "|");
  flags_.push_back({name, placeholder, "one of " + join(choices, ", "), help,
                    [value, choices = std::move(choices)](const std::string& text) {
                      *value = text;
                      return std::find(choices.begin(), choices.end(), text) != choices.end();
                    }});
}

std::optional<int> CommandLine::parse(int argc, char** argv) const {
  for (int i = 0; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      print_help();
      return kSuccess;
    }
    std::optional<std::string> value;
    if (const size_t equals = name.find('='); equals != std::string::npos) {
      value = name.substr(equals + 1);
      name.resize(equals);
    }
    const Flag* flag = find(name);
    if (flag == nullptr) return fail("there is no flag '" + name + "'" + nearest(name));
    if (flag->placeholder.empty()) {
      if (value) return fail(name + " takes no value");
      flag->set("");
      continue;
    }
    if (!value && i + 1 < argc) value = argv[++i];
    if (!value) return fail(name + " needs a value, " + flag->placeholder);
    if (!flag->set(*value)) {
      return fail(name + ": must be " + flag->kind + ", is '" + *value + "'");
    }
  }
  return std::nullopt;
}

int CommandLine::fail(const std::string& message) const {
  std::fprintf(stderr,
               "flash-attn-plus %s: %s\nRun 'flash-attn-plus %s --help' for the flags there are.\n",
               name_.c_str(), message.c_str(), name_.c_str());
  return kUsage;
}

const CommandLine::Flag* CommandLine::find(const std::string& name) const {
  const auto found = std::find_if(flags_.begin(), flags_.end(),
                                  [&](const Flag& flag) { return flag.name == name; });
  return found == flags_.end() ? nullptr : &*found;
}

// ", did you mean ...?" where a flag is a slip of the fingers away.
std::string CommandLine::nearest(const std::string& name) const {
  const size_t max_slips = std::min<size_t>(3, name.size() / 3);
  const auto closer = [&](const Flag& a, const Flag& b) {
    return edit_distance(a.name, name) < edit_distance(b.name, name);
  };
  const auto best = std::min_element(flags_.begin(), flags_.end(), closer);
  if (best == flags_.end() || edit_distance(best->name, name) > max_slips) return "";
  return ", did you mean " + best->name + "?";
}

void CommandLine::print_help() const {
  std::printf("Usage: flash-attn-plus %s%s\n\n%s\n", name_.c_str(),
              flags_.empty() ? "" : " [flags]", summary_.c_str());
  if (flags_.empty()) return;
  size_t width = 0;
  for (const Flag& flag : flags_) {
    width = std::max(width, flag.name.size() + 1 + flag.placeholder.size());
  }
  std::printf("\n");
  for (const Flag& flag : flags_) {
    const std::string left = flag.name + " " + flag.placeholder;
    std::printf("  %-*s  %s\n", static_cast<int>(width), left.c_str(), flag.help.c_str());
  }
}

}  // namespace fa::tools
