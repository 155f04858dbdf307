// One function per command: adds its flags to the program and what happens when it is called.
#pragma once

namespace CLI {
class App;
}

namespace moru {

void add_adapter(CLI::App& app);
void add_bench(CLI::App& app);
void add_forge(CLI::App& app);
void add_gate(CLI::App& app);
void add_improve(CLI::App& app);
void add_info(CLI::App& app);
void add_lighten(CLI::App& app);
void add_pairs(CLI::App& app);
void add_prove(CLI::App& app);
void add_run(CLI::App& app);
void add_serve(CLI::App& app);
void add_tune(CLI::App& app);

}  // namespace moru
