// Registers the kernels of domain `irc` on the CPU, one for each type; the library's only two public symbols are here.

#include <string>

#include "math.h"
#include "operators.h"

namespace irc {
namespace {

template <class T, int Type>
OrtStatus* add_type(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Operator operators[] = {
      make("Compact", "TI", "T", Type, plain<compact<T>>, false, false),
      make("Scatter", "TIT", "T", Type, plain<scatter<T>>, true, false),
      make("ScatterAdd", "TIT", "T", Type, plain<scatter_add<T>>, true, false),
      make("Router", "TTTTT", "F", Type, plain<router<T>>, false, false),
      make("ForecastAdd", "TITTTT", "T", Type, plain<forecast_add<T>>, true, false),
      make("RoutedAttention", "TITTTTT", "TTT", Type, routed_attention<T>, false, true),
  };
  for (const Operator& op : operators)
    if (OrtStatus* status = CustomOpDomainAdd::call(api, domain, &op)) return status;
  return nullptr;
}

OrtStatus* add_operators(const OrtApi* api, OrtCustomOpDomain* domain) {
  static const Operator choices[] = {
      make("SelectRows", "B", "II", kBool, select_rows, false, false),
      make("DecideRows", "F", "II", kFloat, decide_rows, false, false),
  };
  for (const Operator& op : choices)
    if (OrtStatus* status = CustomOpDomainAdd::call(api, domain, &op)) return status;
  if (OrtStatus* status = add_type<float, kFloat>(api, domain)) return status;
  if (OrtStatus* status = add_type<Half, kHalf>(api, domain)) return status;
  return add_type<BFloat, kBFloat>(api, domain);
}

}  // namespace
}  // namespace irc

extern "C" {

// Called by ONNX Runtime (RegisterCustomOpsLibrary).
__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return irc::register_domain(options, base, irc::add_operators);
}

// A description of the library as JSON, which irc reads before it registers the library.
__attribute__((visibility("default"))) const char* irc_native_describe() {
  static const std::string text = std::string("{\"version\": \"" IRC_VERSION "\", \"domain_version\": 1, \"cache_with_room\": true, ") +
      "\"providers\": {\"cpu\": [\"fp32\", \"fp16\", \"bf16\"]}, \"instruction_set\": \"" + irc::instruction_set().name + "\"}";
  return text.c_str();
}

}  // extern "C"
