// The causal convolution with SiLU in one or two directions, with its gradient. Included by native.cpp.

// The inputs of the operator: x, then a weight and a bias per direction.
struct ConvJob {
  Blocks blocks;
  Tensor x;
  View x_view;
  int64_t taps;
  bool reverse;
  std::vector<Tensor> weights;

  ConvJob(at::TensorList inputs, bool reverse)
      : blocks(inputs[0].size(2)), x(rowwise(inputs[0])), x_view(x), taps(inputs[1].size(1)), reverse(reverse) {
    for (size_t i = 1; i < inputs.size(); i += 2) {
      weights.push_back(at::zeros({blocks.count, taps + 1, blocks.lanes}, x.options()));
      pack(inputs[i], 1.0f, blocks, taps + 1, 0, weights.back().data_ptr<float>());
      pack(inputs[i + 1], 1.0f, blocks, taps + 1, taps, weights.back().data_ptr<float>());
    }
  }
  bool reversed(size_t i) const { return i ? !reverse : reverse; }
  // The same steps in the numbering of direction i.
  Span steps_of(size_t i, Span steps) const {
    return reversed(i) ? Span{x.size(1) - steps.end, x.size(1) - steps.begin} : steps;
  }
  Conv block(size_t i, int64_t b, int64_t block, Offset next) const {
    if (reversed(i)) next.steps = -next.steps;
    return {x.size(1), taps, x_view.rows(b, block * blocks.lanes, reversed(i)),
            weights[i].data_ptr<float>() + block * (taps + 1) * blocks.lanes, next};
  }
};

// The steps of a chunk, extended by `before` and `after` steps within the sequence.
Span extended(Span steps, int64_t before, int64_t after, int64_t length) {
  return {std::max<int64_t>(steps.begin - before, 0), std::min(steps.end + after, length)};
}

void conv_forward_block(const Conv& conv, Rows y, Span steps, int64_t channels, int lanes) {
  if (channels == lanes) return kernels().convolve(conv, y, steps);
  Arena memory{thread_memory(2 * ((CHUNK + conv.taps) * lanes + 16))};
  const Rows x = padded(memory, conv.x, extended(steps, conv.taps - 1, 0, conv.length), channels, lanes);
  const Rows out = padded(memory, y, steps, channels, lanes);
  kernels().convolve({conv.length, conv.taps, x, conv.weights, {}}, out, steps);
  unpad(out, y, steps, channels);
}

variable_list conv_forward(const ConvJob& job, at::ScalarType type) {
  variable_list outputs;
  std::vector<View> views;
  for (size_t i = 0; i < job.weights.size(); i++) {
    outputs.push_back(at::empty(job.x.sizes(), job.x.options().memory_format(at::MemoryFormat::Contiguous)));
    views.emplace_back(outputs[i]);
  }
  const int64_t lanes = job.blocks.lanes, length = job.x.size(1);
  for_runs(job.x.size(0), job.blocks, [&](int64_t b, Span run) {
    for_chunks(length, lanes, run, [&](int64_t block, Span steps, Offset next) {
      for (size_t i = 0; i < views.size(); i++) {
        const Rows y = views[i].rows(b, block * lanes, job.reversed(i));
        conv_forward_block(job.block(i, b, block, next), y, job.steps_of(i, steps), job.blocks.width(block), lanes);
      }
    });
  });
  for (Tensor& y : outputs) y = cast(y, type);
  return outputs;
}

void conv_backward_block(const Conv& conv, Rows dy, Rows dx, float* dweights, Span steps, bool add, int64_t channels,
                         int lanes) {
  if (channels == lanes) return kernels().convolve_backward(conv, dy, dx, dweights, steps, add);
  Arena memory{thread_memory(3 * ((CHUNK + 2 * conv.taps) * lanes + 16))};
  const int64_t more = conv.taps - 1;
  const Rows x = padded(memory, conv.x, extended(steps, more, more, conv.length), channels, lanes);
  const Rows dy_copy = padded(memory, dy, extended(steps, 0, more, conv.length), channels, lanes);
  const Rows dx_copy = padded(memory, dx, steps, channels, lanes);
  kernels().convolve_backward({conv.length, conv.taps, x, conv.weights, {}}, dy_copy, dx_copy, dweights, steps, add);
  unpad(dx_copy, dx, steps, channels);
}

variable_list conv_backward(const ConvJob& job, at::TensorList inputs, at::TensorList dy) {
  Tensor dx = at::empty(job.x.sizes(), job.x.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t batch = job.x.size(0), columns = job.taps + 1, count = job.blocks.count, lanes = job.blocks.lanes;
  const int64_t groups = std::clamp<int64_t>(batch * job.x.size(1) / GROUP_STEPS, 1, batch);
  const View dx_view(dx);
  std::vector<Tensor> dys, sums;
  std::vector<View> dy_views;
  for (const Tensor& d : dy) {
    dys.push_back(rowwise(d));
    dy_views.emplace_back(dys.back());
    sums.push_back(at::zeros({groups, count, columns, lanes}, job.x.options()));
  }
  for_runs(groups, job.blocks, [&](int64_t group, Span run) {
    for (int64_t b = group * batch / groups; b < (group + 1) * batch / groups; b++)
      for_chunks(job.x.size(1), lanes, run, [&](int64_t block, Span steps, Offset next) {
        for (size_t i = 0; i < sums.size(); i++) {
          const auto rows = [&](const View& view) { return view.rows(b, block * lanes, job.reversed(i)); };
          float* dweights = sums[i].data_ptr<float>() + (group * count + block) * columns * lanes;
          conv_backward_block(job.block(i, b, block, next), rows(dy_views[i]), rows(dx_view), dweights,
                              job.steps_of(i, steps), i > 0, job.blocks.width(block), lanes);
        }
      });
  });
  variable_list out{cast(dx, inputs[0].scalar_type())};
  for (size_t i = 0; i < sums.size(); i++) {
    out.push_back(unpack(sums[i], inputs[1 + 2 * i], job.blocks, groups, columns, 0));
    out.push_back(unpack(sums[i], inputs[2 + 2 * i], job.blocks, groups, columns, job.taps));
  }
  return out;
}

struct ConvFunction : torch::autograd::Function<ConvFunction> {
  static variable_list forward(AutogradContext* context, at::TensorList inputs, bool reverse) {
    context->save_for_backward(inputs.vec());
    context->saved_data["reverse"] = reverse;
    return conv_forward(ConvJob(inputs, reverse), inputs[0].scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list dy) {
    refuse_second_order();
    const at::AutoDispatchBelowADInplaceOrView below;
    const variable_list inputs = context->get_saved_variables();
    const ConvJob job(inputs, context->saved_data["reverse"].toBool());
    variable_list gradients = conv_backward(job, inputs, dy);
    gradients.emplace_back();  // reverse has none
    return gradients;
  }
};

variable_list conv_silu(at::TensorList inputs, bool reverse) {
  if (wants_gradient(inputs)) return ConvFunction::apply(inputs, reverse);
  return conv_forward(ConvJob(inputs, reverse), inputs[0].scalar_type());
}
