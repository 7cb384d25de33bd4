#include "check.h"

#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <sstream>
#include <string>

namespace ekfac_fast {
namespace {

struct Argument {
  std::string name;
  std::vector<std::string> shapes;  // alternatives, each a string of letters
};

std::vector<Argument> parse(const std::string& line) {
  std::vector<Argument> parsed;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    Argument argument{word.substr(0, word.find('[')), {}};
    bool inside = false;
    for (char c : word) {
      if (c == '[') {
        argument.shapes.emplace_back();
        inside = true;
      } else if (c == ']') {
        inside = false;
      } else if (inside && c != ',') {
        argument.shapes.back() += c;
      }
    }
    parsed.push_back(argument);
  }
  return parsed;
}

const std::vector<Argument>& parsed(const char* line) {
  static std::map<std::string, std::vector<Argument>> cache;
  static std::mutex guard;
  std::lock_guard<std::mutex> lock(guard);
  auto found = cache.find(line);
  return found != cache.end() ? found->second : cache.emplace(line, parse(line)).first->second;
}

std::string printed(const std::string& letters) {
  std::string text = "[";
  for (char c : letters) text += (text.size() > 1 ? "," : "") + std::string(1, c);
  return text + "]";
}

bool accumulates(const std::string& name) {
  return name == "cov" || name == "lam" || name == "lam_sum" || name == "s";
}

bool floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

// As Python prints it.
std::string printed(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "torch.float32";
    case at::kDouble: return "torch.float64";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kHalf: return "torch.float16";
    case at::kInt: return "torch.int32";
    case at::kLong: return "torch.int64";
    case at::kBool: return "torch.bool";
    default: return c10::toString(dtype);
  }
}

}  // namespace

Letters check(const char* op, const char* line, const Arguments& args, bool bias, double damping,
              const std::optional<c10::string_view>& order) {
  const auto& named = parsed(line);
  TORCH_INTERNAL_ASSERT(named.size() == args.size());
  std::map<char, int64_t> letters;
  std::map<char, std::string> where;
  const at::Tensor* first = nullptr;
  const at::Tensor* operand = nullptr;
  std::string operand_name;
  for (size_t i = 0; i < named.size(); i++) {
    TORCH_CHECK_VALUE(
        named[i].name != "Qa" || args[i] || !bias, op,
        ": bias=True but Qa is None. Activations already in the eigenbasis include the "
        "bias row of Qa: pass them with bias=False");
  }
  for (size_t i = 0; i < named.size(); i++) {
    if (!args[i]) continue;
    const at::Tensor& x = *args[i];
    const auto& [name, alternatives] = named[i];
    const std::string* shape = nullptr;
    std::string expected;
    for (const auto& alternative : alternatives) {
      expected += (expected.empty() ? "" : " or ") + printed(alternative);
      if (static_cast<int64_t>(alternative.size()) == x.dim()) shape = &alternative;
    }
    TORCH_CHECK_VALUE(shape, op, ": ", name, " has shape ", x.sizes(), ", expected ", expected);
    for (size_t d = 0; d < shape->size(); d++) {
      const char letter = (*shape)[d];
      // I and J are one letter apart from the bias, so either may be seen first.
      const char key = letter == 'J' ? 'I' : letter;
      const int64_t value = x.size(d) - (letter == 'J' && bias);
      const auto [bound, fresh] = letters.emplace(key, value);
      if (fresh) where[key] = name + " " + c10::str(x.sizes());
      TORCH_CHECK_VALUE(bound->second == value, op, ": ", name, " has shape ", x.sizes(),
                        ", expected ", printed(*shape), " with ", letter, "=",
                        bound->second + (letter == 'J' && bias), " (from ", where[key],
                        bias && key == 'I' ? ", J = I + 1 because bias=True" : "", ")");
    }
    if (!first) first = &x;
    TORCH_CHECK(x.device() == first->device(), op, ": ", name, " is on ", x.device(), " but ",
                named[0].name, " is on ", first->device(), "; move one");
    if (accumulates(name) || name == "mask") continue;
    TORCH_CHECK_TYPE(floating(x.scalar_type()), op, ": ", name, " is ", printed(x.scalar_type()),
                     ", expected float32, bfloat16, float16 or float64");
    if (!operand) {
      operand = &x;
      operand_name = name;
    }
    TORCH_CHECK_TYPE(x.scalar_type() == operand->scalar_type(), op, ": ", name, " is ",
                     printed(x.scalar_type()), " but ", operand_name, " is ",
                     printed(operand->scalar_type()), "; operands share one dtype");
  }
  const auto wide = operand->scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (size_t i = 0; i < named.size(); i++) {
    if (!args[i] || !accumulates(named[i].name)) continue;
    TORCH_CHECK_TYPE(args[i]->scalar_type() == wide, op, ": ", named[i].name, " is ",
                     printed(args[i]->scalar_type()), ", expected ", printed(wide),
                     " (operands are ", printed(operand->scalar_type()), ")");
  }
  TORCH_CHECK_VALUE(damping >= 0, op, ": damping is ", damping, ", expected a number >= 0");
  TORCH_CHECK_VALUE(!order || *order == "tokens" || *order == "a_tokens" || *order == "g_tokens" ||
                        *order == "gradient",
                    op, ": order is '", *order,
                    "', expected one of tokens, a_tokens, g_tokens, gradient");
  auto size = [&](char letter, int64_t otherwise) {
    auto found = letters.find(letter);
    return found == letters.end() ? otherwise : found->second;
  };
  const int64_t I = size('I', 0);
  return {size('B', 1), size('T', 1), I,           I + bias, size('O', 0),
          size('Q', 0), size('K', 0), size('N', 0)};
}

Order contraction_order(const Letters& size, const std::optional<c10::string_view>& forced) {
  if (!forced) return {size.T < size.O, size.T < size.J};
  if (*forced == "tokens") return {true, true};
  if (*forced == "a_tokens") return {true, false};
  if (*forced == "g_tokens") return {false, true};
  return {false, false};
}

}  // namespace ekfac_fast
