// Flags of one subcommand: what there is, where its value goes, and the help that follows from it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace fa::tools {

// Exit codes.
inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 1;  // the work was done, and something is wrong
inline constexpr int kUsage = 2;    // the work was not begun

class CommandLine {
 public:
  // `name` as in "flash-attn-plus NAME".
  CommandLine(std::string name, std::string summary);

  void flag(const char* name, bool* value, const char* help);
  void option(const char* name, const char* placeholder, int64_t* value, const char* help);
  void option(const char* name, const char* placeholder, double* value, const char* help);
  void option(const char* name, const char* placeholder, std::string* value, const char* help);
  void option(const char* name, const char* placeholder, std::optional<double>* value,
              const char* help);
  // One of `choices`.
  void choice(const char* name, std::vector<std::string> choices, std::string* value,
              const char* help);

  // Reads "--name value" and "--name=value". An exit code where there is nothing left to do: --help
  // was printed, or the flags are wrong and standard error says how.
  std::optional<int> parse(int argc, char** argv) const;

  // Prints what is wrong, and where help is; returns kUsage.
  int fail(const std::string& message) const;

 private:
  struct Flag {
    std::string name;         // "--batch"
    std::string placeholder;  // "" for a flag without a value
    std::string kind;         // "a whole number"
    std::string help;
    std::function<bool(const std::string& value)> set;  // false: not such a value
  };

  const Flag* find(const std::string& name) const;
  std::string nearest(const std::string& name) const;
  void print_help() const;

  std::string name_;
  std::string summary_;
  std::vector<Flag> flags_;
};

}  // namespace fa::tools
