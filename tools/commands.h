// The subcommands of flash-attn-plus. Each gets the arguments behind its own name.
#pragma once

namespace fa::tools {

int run_info(int argc, char** argv);
int run_explain(int argc, char** argv);
int run_check(int argc, char** argv);
int run_bench(int argc, char** argv);
int run_cache(int argc, char** argv);

}  // namespace fa::tools
