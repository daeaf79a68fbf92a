// A client that calls an operator of torch by its schema; torch's own client, in Python, can do so for some only.
//
// Every argument that is a text is the given one; the others are small values of their types.

#define USE_RPC 1
#define USE_DISTRIBUTED 1
#define USE_TENSORPIPE 1
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/rpc/rpc_agent.h>
#include <torch/csrc/distributed/rpc/script_call.h>
#include <torch/csrc/jit/runtime/operator.h>

using namespace torch::distributed::rpc;

static c10::IValue value(const std::string& name, const c10::TypePtr& type, const std::string& text) {
  switch (type->kind()) {
    case c10::TypeKind::StringType: return text;
    case c10::TypeKind::BoolType: return true;
    case c10::TypeKind::FloatType: return 1.0;
    case c10::TypeKind::IntType:  // a type of elements and a layout, too: uint8, strided
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::NumberType: return int64_t(name == "size" ? 2 : 0);
    case c10::TypeKind::TensorType: return at::zeros({2}, name == "out" ? at::kByte : at::kFloat);
    case c10::TypeKind::DeviceObjType: return c10::Device("cpu");
    case c10::TypeKind::OptionalType: {
      auto inner = type->containedType(0);
      bool plain = inner->kind() == c10::TypeKind::StringType || inner->kind() == c10::TypeKind::BoolType ||
          inner->kind() == c10::TypeKind::IntType;
      return plain ? value(name, inner, text) : c10::IValue();
    }
    case c10::TypeKind::ListType: {
      auto inner = type->containedType(0)->kind();
      if (inner == c10::TypeKind::StringType) return c10::List<std::string>({text});
      if (inner == c10::TypeKind::TensorType) return c10::List<at::Tensor>({at::zeros({2})});
      return c10::List<int64_t>({2});
    }
    default: return int64_t(7);
  }
}

extern "C" const char* call(const char* peer, const char* name, const char* overload, const char* text) {
  static std::string outcome;
  outcome = "no such operator";
  try {
    for (auto& op : torch::jit::getAllOperatorsFor(c10::Symbol::fromQualString(name))) {
      if (op->schema().overload_name() != overload) continue;
      std::vector<c10::IValue> stack;
      for (auto& argument : op->schema().arguments()) stack.push_back(value(argument.name(), argument.type(), text));
      auto agent = RpcAgent::getCurrentRpcAgent();
      agent->send(agent->getWorkerInfo(peer), ScriptCall(op, std::move(stack)).toMessage(), 20)->waitAndThrow();
      outcome = "answered";
    }
  } catch (const std::exception& error) {
    outcome = error.what();
  }
  return outcome.c_str();
}
